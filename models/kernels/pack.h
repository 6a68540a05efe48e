/* What a product of models/kernels/decode_step.c reads: a weight, laid out in panels, and a few rows of inputs.

   A weight [outputs, inputs] lies in panels of 32 outputs. A panel is a sequence of entries of two vectors,
   one entry for each input (fp32), pair of inputs (bf16), four (8 bits) or eight of them (4 bits), so that an
   entry times one number, or two, is what every row needs next, and memory is read from one end to the other.
   The inputs of a product lie row by row; those for weights of 4 bits are the same as for 8. */

#pragma once

#include "simd.h"

/* Where the processor multiplies tiles, 16 rows of 64 bytes: half a panel's 16 entries are one as they lie.
 */
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define MULTIPLIES_TILES
enum { TILE = 16 };
#else
enum { TILE = 1 };
#endif

typedef struct {
    const void *panels;
    const float *bias, *scales; /* of each output; or NULL */
    int64_t entries;            /* of each panel; a member may use fewer */
    int64_t type;               /* of the weight */
} Map;

/* The type of a weight's inputs. */
INLINE int inputs_for(int type) { return type == INT4 ? INT8 : type; }

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

/* Inputs of a product: [rows][entries]. */
typedef struct {
    void *values;
    int rows;
    int room;     /* for so many entries of each row */
    int together; /* so many rows at most are multiplied at once by tiles */
} Input;

/* Entries from one row to the next: no power of two, or rows would not fit into the nearest cache together.
 */
INLINE size_t row_of(int room) { return (size_t)ceil_div(room, TILE) * TILE + LANES; }

INLINE size_t input_of(int type, int rows, int inputs) { /* its size, in units of 4 bytes */
    /* A tile's rows are read, whichever are there. */
    size_t all = (size_t)(rows + TILE - 1) * row_of(depth(type, inputs)) * input_size(type);
    return padded((header_size(type, rows) + all) / 4);
}

/* Of so many rows, among those of a pass, for which tiles are shaped. */
INLINE Input input_at(void *values, int type, int rows, int inputs, int of_pass) {
    return (Input){values, rows, depth(type, inputs), ceil_div(of_pass, ceil_div(of_pass, TILE))};
}

/* The same with fewer rows. */
INLINE Input of_rows(Input input, int rows) {
    input.rows = rows;
    return input;
}

/* Where the entries of a row begin. */
INLINE char *entries_of(int type, Input input, int row) {
    return (char *)input.values + header_size(type, input.rows) + row * row_of(input.room) * input_size(type);
}

/* The whole of a row in 8 bits: its largest value becomes 127. */
INLINE void place_codes(const float *values, int count, Input input, int row) {
    float most = largest_size(values, count), inverse = most > 0 ? 127.0f / most : 0;
    int32_t sum = 0;
    int8_t *codes = (int8_t *)entries_of(INT8, input, row);
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) {
        int32_t code = (int32_t)rintf(values[i] * inverse);
        codes[i] = (int8_t)code;
        sum += code;
    }
    for (int i = count; i < 4 * depth(INT8, count); i++) codes[i] = 0;
    ((float *)input.values)[row] = most / 127.0f;
    ((int32_t *)input.values)[input.rows + row] = sum;
}

/* Put values [count] of a row in FP32 or BF16 where a product reads its inputs from `first`, even, on. */
INLINE void place(int type, const float *values, int first, int count, Input input, int row) {
    char *to = entries_of(type, input, row) + input_size(type) * (size_t)depth(type, first);
    if (type == BF16 && PAIRS_ARE_WORDS)
        put(BF16, values, 1, count / 2 * 2, to, 0);
    else
        memcpy(to, values, 4 * (size_t)(type == BF16 ? count / 2 * 2 : count));
}

/* The same for the whole of a row in any type. */
INLINE void place_row(int type, const float *values, int count, Input input, int row) {
    if (type == INT8)
        place_codes(values, count, input, row);
    else
        place(type, values, 0, count, input, row);
}

/* Weights are asked for so many entries before they are needed: a cache's own guess stops at each page. SOON
   is for those that a nearer cache holds. */
enum { AHEAD = 112, SOON = 32 };

/* The numbers that sums of products of codes stand for: those of weights are 128 or 8 more than they mean. */
INLINE lanes meaning(int type, words counts, Input input, int row, const float *scales) {
    int32_t more = (type == INT4 ? 8 : 128) * ((const int32_t *)input.values)[input.rows + row];
    lanes scale = load(scales) * ((const float *)input.values)[row];
    return __builtin_convertvector((whole)(counts - (uint32_t)more), lanes) * scale;
}
