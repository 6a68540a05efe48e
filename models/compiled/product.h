/* Numbers and products of models/compiled/step.c: of a weight, laid out in panels, with a few rows of inputs.

   A weight [outputs, inputs] lies in panels of 32 outputs. A panel is a sequence of entries of two vectors,
   one entry for each input (fp32), pair of inputs (bf16) or four of them (8 bits), so that an entry times one
   number is what every row needs next, and memory is read from one end to the other. The inputs of a product
   lie the other way round, [entries][rows].

   A row's result is the same bits among any others: its sums run over the inputs in their order, and a
   product is fused with its sum where it says so and nowhere else. */

#pragma once

#include "numbers.h"
/* Where the processor multiplies tiles, of 16 rows of 64 bytes: half a panel's 16 entries are one as they
 * lie. */
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include <sys/syscall.h>
#include <unistd.h>
enum { TILES = 1, TILE = 16 };
#else
enum { TILES = 0, TILE = 1 };
#endif

typedef struct {
    const void *panels;
    const float *bias, *scales; /* of each output; or NULL */
    int64_t entries;            /* of each panel; a member may use fewer */
} Map;

/* bf16 inputs: a pair is one word where the processor takes them so, else two fp32 numbers. */
#ifdef __AVX512BF16__
enum { PAIRS_ARE_WORDS = 1 };
INLINE lanes add_pair(lanes sum, words pair, const void *x, size_t i) {
    __m512i both = _mm512_set1_epi32(((const int32_t *)x)[i]);
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)both);
}
#else
enum { PAIRS_ARE_WORDS = 0 };
INLINE lanes add_pair(lanes sum, words pair, const void *x, size_t i) {
    const float *both = (const float *)x + 2 * i;
    sum = fused((lanes)(pair << 16), spread(both[0]), sum);
    return fused((lanes)(pair & 0xffff0000u), spread(both[1]), sum);
}
#endif

/* Sums of four products each: of unsigned bytes, which weights are here, and signed ones. */
INLINE words add_four(words sums, words four, const void *x, size_t i) {
#ifdef __AVX512VNNI__
    __m512i all = _mm512_set1_epi32(((const int32_t *)x)[i]);
    return (words)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)four, all);
#else
    const int8_t *codes = (const int8_t *)x + 4 * i;
    for (int k = 0; k < 4; k++) sums += (four >> (8 * k) & 255u) * (uint32_t)codes[k];
    return sums;
#endif
}

INLINE int depth(int type, int inputs) {
    return type == INT8 ? ceil_div(inputs, 4) : type == BF16 ? ceil_div(inputs, 2) : inputs;
}

INLINE size_t input_size(int type) { /* bytes of one of `depth` entries for one row */
    return type == BF16 && !PAIRS_ARE_WORDS ? 8 : 4;
}

/* Before the entries of INT8 lie each row's scale (fp32) and the sum of its codes (int32). */
INLINE size_t header_size(int type, int num_rows) {
    return type == INT8 ? 4 * padded(2 * (size_t)num_rows) : 0;
}

/* Inputs of a product: [entries][rows], or for tiles [rows, up to a whole tile][entries]. */
typedef struct {
    void *values;
    int rows;
    int room; /* for so many entries of each row */
} Input;

INLINE int by_row(int type) { return TILES && type != FP32; }

/* Bytes from one row to the next: no power of two, or a tile's rows would not fit into the nearest cache. */
INLINE size_t row_size(int room) { return (size_t)ceil_div(room, TILE) * TILE * 4 + 64; }

INLINE size_t input_of(int type, int rows, int inputs) { /* its size, in units of 4 bytes */
    int n = depth(type, inputs);
    size_t all = by_row(type) ? (size_t)ceil_div(rows, TILE) * TILE * row_size(n)
                              : (size_t)rows * input_size(type) * n;
    return padded((header_size(type, rows) + all) / 4);
}

INLINE Input input_at(void *values, int type, int rows, int inputs) {
    return (Input){values, rows, depth(type, inputs)};
}

/* Where the entries of a row begin. */
INLINE char *entries_of(int type, Input input, int row) {
    size_t each = by_row(type) ? row_size(input.room) : input_size(type);
    return (char *)input.values + header_size(type, input.rows) + row * each;
}

/* The whole of a row in 8 bits: its largest value becomes 127. */
INLINE void place_codes(const float *values, int count, Input input, int row, int8_t *codes) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < count; i++) most = fabsf(values[i]) > most ? fabsf(values[i]) : most;
    float inverse = most > 0 ? 127.0f / most : 0;
    int32_t sum = 0;
    int n = depth(INT8, count);
    char *to = entries_of(INT8, input, row);
    if (by_row(INT8)) codes = (int8_t *)to;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) {
        int32_t code = (int32_t)rintf(values[i] * inverse);
        codes[i] = (int8_t)code;
        sum += code;
    }
    for (int i = count; i < 4 * n; i++) codes[i] = 0;
    ((float *)input.values)[row] = most / 127.0f;
    ((int32_t *)input.values)[input.rows + row] = sum;
    if (by_row(INT8)) return;
    for (int i = 0; i < n; i++) memcpy(to + 4 * (size_t)i * input.rows, codes + 4 * i, 4);
}

/* Put values [count] of a row where a product reads its inputs from `first`, even, on. */
INLINE void place(int type, const float *values, int first, int count, Input input, int row) {
    char *to = entries_of(type, input, row);
    size_t step = by_row(type) ? 1 : (size_t)input.rows, at = (size_t)depth(type, first) * step;
    if (type == FP32) {
        for (int i = 0; i < count; i++) ((float *)to)[at + i * step] = values[i];
    } else if (by_row(type)) {
        put(BF16, values, 1, count / 2 * 2, to, 2 * at);
    } else if (PAIRS_ARE_WORDS) {
        for (int i = 0; i < count / 2; i++)
            ((uint32_t *)to)[at + i * step] = to_bf16(values[2 * i]) | (uint32_t)to_bf16(values[2 * i + 1])
                                                                           << 16;
    } else {
        for (int i = 0; i < count / 2; i++) memcpy(to + 8 * (at + i * step), values + 2 * i, 8);
    }
}

/* The same for the whole of a row in any type. */
INLINE void place_row(int type, const float *values, int count, Input input, int row, int8_t *codes) {
    if (type == INT8)
        place_codes(values, count, input, row, codes);
    else
        place(type, values, 0, count, input, row);
}

/* Weights are asked for so many entries before they are needed: a cache's own guess stops at each page. */
enum { AHEAD = 112 };

/* The numbers that sums of products of codes stand for: weights are 128 more than they mean. */
INLINE lanes meaning(words counts, Input input, int row, const float *scales) {
    int32_t more = 128 * ((const int32_t *)input.values)[input.rows + row];
    lanes scale = load(scales) * ((const float *)input.values)[row];
    return __builtin_convertvector((whole)(counts - (uint32_t)more), lanes) * scale;
}

/* y [rows][PANEL], its rows `stride` apart, of the input's rows from `first` on. `scales` of the outputs are
   INT8's. */
INLINE void block(int type, int rows, const words *weights, const float *scales, int n, Input input,
                  int first, float *y, size_t stride) {
    lanes sums[BLOCK][HALVES];
    words counts[BLOCK][HALVES]; /* INT8's sums: in a type of their own, else they are moved at every step */
    const char *x = entries_of(type, input, first);
    size_t row = by_row(type) ? row_size(input.room) / 4 : 1, entry = by_row(type) ? 1 : (size_t)input.rows;
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) sums[r][h] = (lanes){0}, counts[r][h] = (words){0};
    for (size_t i = 0; i < (size_t)n; i++) {
        for (int h = 0; h < HALVES; h++) __builtin_prefetch(weights + (i + AHEAD) * HALVES + h);
        for (int h = 0; h < HALVES; h++)
            for (int r = 0; r < rows; r++) {
                words w = weights[i * HALVES + h];
                size_t at = i * entry + r * row;
                if (type == INT8)
                    counts[r][h] = add_four(counts[r][h], w, x, at);
                else if (type == BF16)
                    sums[r][h] = add_pair(sums[r][h], w, x, at);
                else
                    sums[r][h] = fused((lanes)w, spread(((const float *)x)[at]), sums[r][h]);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) {
            if (type == INT8) sums[r][h] = meaning(counts[r][h], input, first + r, scales + h * LANES);
            store(sums[r][h], y + r * stride + h * LANES);
        }
}

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
/* Whether the system lets this process use tiles; it is asked when the library is opened. */
static int has_tiles;

__attribute__((constructor)) static void ask_for_tiles(void) {
    enum { ASK = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, and what it is asked for */
    has_tiles = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

/* Between these two a thread may call `product`. */
INLINE void begin_tiles(void) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 4 * TILE, shape.rows[i] = TILE;
    if (has_tiles) _tile_loadconfig(&shape);
}

INLINE void end_tiles(void) {
    if (has_tiles) _tile_release();
}

/* `block` for up to a tile of rows of BF16 or INT8. In BF16 its sums run in another order than those of
   `block`, which then no row has; whole numbers have the same sum in any. Entries beyond whole tiles follow.
 */
INLINE void block_of_tiles(int type, int rows, const words *weights, const float *scales, int n, Input input,
                           int first, float *y, size_t stride) {
    words found[HALVES][TILE];
    const char *x = entries_of(type, input, first);
    size_t each = row_size(input.room);
    int i = 0;
    _tile_zero(0);
    _tile_zero(1);
    for (; i + TILE <= n; i += TILE) {
        _tile_loadd(2, x + 4 * i, each);
        _tile_loadd(3, weights + i * HALVES, HALVES * sizeof(words));
        _tile_loadd(4, weights + i * HALVES + 1, HALVES * sizeof(words));
        if (type == INT8) {
            _tile_dpbsud(0, 2, 3);
            _tile_dpbsud(1, 2, 4);
        } else {
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
    }
    _tile_stored(0, found[0], sizeof(words));
    _tile_stored(1, found[1], sizeof(words));
    __asm__ volatile("" : : "r"(found) : "memory"); /* the compiler does not know what a tile's store does */
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) {
            words sums = found[h][r];
            for (int k = i; k < n; k++) {
                words w = weights[k * HALVES + h];
                sums = type == INT8 ? add_four(sums, w, x + r * each, (size_t)k)
                                    : (words)add_pair((lanes)sums, w, x + r * each, (size_t)k);
            }
            lanes values = type == INT8 ? meaning(sums, input, first + r, scales + h * LANES) : (lanes)sums;
            store(values, y + r * stride + h * LANES);
        }
}

/* Whether so many rows are a product of tiles: in BF16 any are, or their sums would differ. */
INLINE int by_tiles(int type, int rows) { return has_tiles && (type == BF16 || (type == INT8 && rows > 1)); }
#else
INLINE void begin_tiles(void) {}
INLINE void end_tiles(void) {}
INLINE int by_tiles(int type, int rows) { return (void)type, (void)rows, 0; }
INLINE void block_of_tiles(int type, int rows, const words *weights, const float *scales, int n, Input input,
                           int first, float *y, size_t stride) {
    (void)type, (void)rows, (void)weights, (void)scales, (void)n, (void)input, (void)first, (void)y,
        (void)stride;
}
#endif

#define ROWS(count)                                                                                          \
    case count:                                                                                              \
        block(type, count, weights, scales, n, input, row, out, stride);                                     \
        break;

INLINE void product_of(int type, const words *weights, const float *scales, int n, Input input, float *y,
                       size_t stride) {
    int rows = input.rows, lots = ceil_div(rows, BLOCK);
    if (by_tiles(type, rows)) {
        for (int row = 0; row < rows; row += TILE)
            block_of_tiles(type, rows - row < TILE ? rows - row : TILE, weights, scales, n, input, row,
                           y + row * stride, stride);
        return;
    }
    for (int lot = 0; lot < lots; lot++) {
        int row = rows * lot / lots;
        float *out = y + row * stride;
        switch (rows * (lot + 1) / lots - row) {
            // clang-format off
            ROWS(1) ROWS(2) ROWS(3)
#ifdef __AVX512F__
            ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
            // clang-format on
        }
    }
}

/* y [rows][PANEL] of a panel of a map, of whose entries the first n are used. */
static __attribute__((noinline)) void product(int type, Map map, int panel, int n, Input input, float *y,
                                              size_t stride) {
    const words *weights = (const words *)map.panels + (size_t)panel * map.entries * HALVES;
    if (type == INT8)
        product_of(INT8, weights, map.scales + panel * PANEL, n, input, y, stride);
    else if (type == BF16)
        product_of(BF16, weights, NULL, n, input, y, stride);
    else
        product_of(FP32, weights, NULL, n, input, y, stride);
}
