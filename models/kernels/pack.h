/* What a product of models/kernels/decode_step.c reads: a weight, laid out in panels, and a few rows of
   inputs.

   A weight [outputs, inputs] lies in panels of 32 outputs. A panel is a sequence of entries of two vectors,
   one entry for each input (fp32), pair of inputs (bf16), four (8 bits) or eight of them (4 bits), so that an
   entry times one number, or two, is what every row needs next, and memory is read from one end to the other.
   The inputs of a product lie row by row; those for weights of 4 bits are the same as for 8.

   Weights in blocks of 32 inputs (Q8_0, Q4_0, Q4_1) and their inputs: models/kernels/matmul_blocks.h. */

#pragma once

#include "vector_math.h"

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
    int64_t entries;            /* of each panel, or blocks; a member may use fewer */
    int64_t type;               /* of the weight */
} Map;

/* Inputs of 8 bits for weights in blocks, each with a scale of its own; BLOCKS is the type of such a row. */
enum { BLOCK = 32, BLOCKS = 7 };

typedef struct {
    float scale, scaled_sum;
    int32_t sum; /* of the codes */
    int32_t codes[BLOCK / 4];
} InputBlock;

INLINE int is_blocks(int type) { return type == Q8_0 || type == Q4_0 || type == Q4_1; }

/* The type of a weight's inputs. */
INLINE int inputs_for(int type) { return type == INT4 ? INT8 : is_blocks(type) ? BLOCKS : type; }

/* Whether a row of inputs is scaled as a whole, once all of it is there. */
INLINE int is_scaled(int type) { return type == INT8 || type == BLOCKS; }

INLINE int depth(int type, int inputs) {
    if (type == BLOCKS) return ceil_div(inputs, BLOCK) * (int)(sizeof(InputBlock) / 4);
    return type == INT8 ? ceil_div(inputs, 4) : type == BF16 ? ceil_div(inputs, 2) : inputs;
}

INLINE size_t input_size(int type) { /* bytes of one of `depth` entries for one row */
    return (type == BF16 && !PAIRS_ARE_WORDS) || (type == INT8 && WIDE_CODES) ? 8 : 4;
}

/* Before the entries of INT8 lie each row's scale (fp32) and the sum of its codes (int32). */
INLINE size_t header_size(int type, int num_rows) {
    return type == INT8 ? 4 * padded(2 * (size_t)num_rows) : 0;
}

/* Inputs of a product: [rows][entries]. */
typedef struct {
    void *values;
    int rows;
    int room;      /* entries that fit in each row */
    int tile_rows; /* the most rows that tiles multiply at once */
} Input;

/* Entries from one row to the next: no power of two, or rows would share sets of the nearest cache. */
INLINE size_t row_of(int room) { return (size_t)ceil_div(room, TILE) * TILE + 16; }

INLINE size_t input_of(int type, int rows, int inputs) { /* its size, in units of 4 bytes */
    /* A tile's rows are read, whichever are there. */
    size_t all = (size_t)(rows + TILE - 1) * row_of(depth(type, inputs)) * input_size(type);
    return padded((header_size(type, rows) + all) / 4);
}

/* An input of some of the rows of a pass, for all of which tiles are shaped. */
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

/* Widened codes of a row's entries, 16 bits each, in the order in which `add_four` takes them: 0, 2, 1, 3. */
INLINE void order_codes(int16_t *codes, int entries) {
    uint64_t *all = (uint64_t *)codes; /* an entry each; the first code is in the lowest bits */
#pragma omp simd
    for (int i = 0; i < entries; i++)
        all[i] = (all[i] & 0xffff00000000ffffu) | (all[i] & 0xffff0000u) << 16 | (all[i] >> 16 & 0xffff0000u);
}

/* A row in 8 bits: its largest value becomes 127. */
INLINE void place_codes(const float *values, int count, Input input, int row) {
    float most = largest_size(values, count), inverse = most > 0 ? 127.0f / most : 0;
    int32_t sum = 0;
    void *to = entries_of(INT8, input, row);
#define PLACE_AS(code_type)                                                                                  \
    _Pragma("omp simd reduction(+ : sum)") for (int i = 0; i < count; i++) {                                 \
        int32_t code = (int32_t)rintf(values[i] * inverse);                                                  \
        ((code_type *)to)[i] = (code_type)code;                                                              \
        sum += code;                                                                                         \
    }                                                                                                        \
    for (int i = count; i < 4 * entries; i++) ((code_type *)to)[i] = 0;
    if (WIDE_CODES) {
        int entries = ceil_div(depth(INT8, count), 2) * 2; /* a last entry alone is half of one of 4 bits */
        PLACE_AS(int16_t)
        order_codes(to, entries);
    } else {
        int entries = LANES == 16 ? depth(INT8, count) : ceil_div(depth(INT8, count), 2) * 2;
        PLACE_AS(int8_t)
    }
#undef PLACE_AS
    ((float *)input.values)[row] = most / 127.0f;
    ((int32_t *)input.values)[input.rows + row] = sum;
}

/* A row in blocks of 8 bits: the largest value of each becomes 127. */
INLINE void place_blocks(const float *values, int count, Input input, int row) {
    InputBlock *to = (InputBlock *)entries_of(BLOCKS, input, row);
    for (int first = 0; first < count; first += BLOCK, to++) {
        float some[BLOCK] = {0};
        int8_t *codes = (int8_t *)to->codes;
        int left = count - first < BLOCK ? count - first : BLOCK;
        memcpy(some, values + first, 4 * (size_t)left);
        float most = largest_size(some, BLOCK), inverse = most > 0 ? 127.0f / most : 0;
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < BLOCK; i++) {
            int32_t code = (int32_t)rintf(some[i] * inverse);
            codes[i] = (int8_t)code;
            sum += code;
        }
        to->scale = most / 127.0f, to->sum = sum;
        to->scaled_sum = to->scale * (float)sum;
    }
}

/* Put values [count] of a row in FP32 or BF16 where a product reads its inputs from `first`, even, on. */
INLINE void place(int type, const float *values, int first, int count, Input input, int row) {
    char *to = entries_of(type, input, row) + input_size(type) * (size_t)depth(type, first);
    if (type == BF16 && PAIRS_ARE_WORDS)
        store_row(BF16, values, 1, count / 2 * 2, to, 0);
    else
        memcpy(to, values, 4 * (size_t)(type == BF16 ? count / 2 * 2 : count));
}

/* The same for the whole of a row in any type. */
INLINE void place_row(int type, const float *values, int count, Input input, int row) {
    if (type == INT8)
        place_codes(values, count, input, row);
    else if (type == BLOCKS)
        place_blocks(values, count, input, row);
    else
        place(type, values, 0, count, input, row);
}

/* Prefetch distance in panel entries, from DRAM and from a nearer cache (SOON); the hardware prefetcher stops
   at page boundaries. */
enum { AHEAD = 112, SOON = 32 };

/* The numbers that sums of products of codes stand for: those of weights are 128 or 8 more than they mean. */
INLINE lanes dequantize(int type, words counts, Input input, int row, const float *scales) {
    int32_t middle = type == INT4 ? 8 : SIGNED_CODES ? 0 : 128;
    int32_t more = middle * ((const int32_t *)input.values)[input.rows + row];
    lanes scale = load(scales) * ((const float *)input.values)[row];
    return __builtin_convertvector((ints)(counts - (uint32_t)more), lanes) * scale;
}
