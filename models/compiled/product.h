/* Numbers and products of models/compiled/step.c: of a weight, laid out in panels, with a few rows of inputs.

   A weight [outputs, inputs] lies in panels of 32 outputs. A panel is a sequence of entries of two vectors,
   one entry for each input (fp32), pair of inputs (bf16) or four of them (8 bits), so that an entry times one
   number is what every row needs next, and memory is read from one end to the other. The inputs of a product
   lie the other way round, [entries][rows].

   A row's result is the same bits among any others: its sums run over the inputs in their order, and a
   product is fused with its sum where it says so and nowhere else. */

#pragma once

#include "numbers.h"

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
INLINE size_t header_size(int type, int num_rows) { return type == INT8 ? 8 * (size_t)num_rows : 0; }

INLINE size_t input_of(int type, int rows, int inputs) { /* its size, in units of 4 bytes */
    return padded((header_size(type, rows) + rows * input_size(type) * depth(type, inputs)) / 4);
}

/* The whole of a row in 8 bits: its largest value becomes 127. */
INLINE void place_codes(const float *values, int count, void *input, int num_rows, int row, int8_t *codes) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < count; i++) most = fabsf(values[i]) > most ? fabsf(values[i]) : most;
    float inverse = most > 0 ? 127.0f / most : 0;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) {
        int32_t code = (int32_t)rintf(values[i] * inverse);
        codes[i] = (int8_t)code;
        sum += code;
    }
    int n = depth(INT8, count);
    for (int i = count; i < 4 * n; i++) codes[i] = 0;
    ((float *)input)[row] = most / 127.0f;
    ((int32_t *)input)[num_rows + row] = sum;
    char *to = (char *)input + header_size(INT8, num_rows) + 4 * (size_t)row;
    for (int i = 0; i < n; i++) memcpy(to + 4 * (size_t)i * num_rows, codes + 4 * i, 4);
}

/* Put values [count] of a row where a product of `num_rows` rows reads its inputs from `first`, even, on. */
INLINE void place(int type, const float *values, int first, int count, void *input, int num_rows, int row) {
    size_t at = (size_t)depth(type, first) * num_rows + row;
    if (type == FP32) {
        float *x = (float *)input + at;
        for (int i = 0; i < count; i++) x[(size_t)i * num_rows] = values[i];
    } else if (PAIRS_ARE_WORDS) {
        uint32_t *x = (uint32_t *)input + at;
        for (int i = 0; i < count / 2; i++)
            x[(size_t)i * num_rows] = to_bf16(values[2 * i]) | (uint32_t)to_bf16(values[2 * i + 1]) << 16;
    } else {
        float *x = (float *)input + 2 * at;
        for (int i = 0; i < count / 2; i++) memcpy(x + 2 * (size_t)i * num_rows, values + 2 * i, 8);
    }
}

/* The same for the whole of a row in any type. */
INLINE void place_row(int type, const float *values, int count, void *input, int num_rows, int row,
                      int8_t *codes) {
    if (type == INT8)
        place_codes(values, count, input, num_rows, row, codes);
    else
        place(type, values, 0, count, input, num_rows, row);
}

/* Weights are asked for so many entries before they are needed: a cache's own guess stops at each page. */
enum { AHEAD = 112 };

/* y [rows][PANEL], its rows `stride` apart. `scales` of the outputs and the rows' `header` are INT8's. */
INLINE void block(int type, int rows, const words *weights, const float *scales, size_t n, const char *header,
                  const void *input, size_t num_rows, float *y, size_t stride) {
    lanes sums[BLOCK][HALVES];
    words counts[BLOCK][HALVES]; /* INT8's sums: in a type of their own, else they are moved at every step */
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) sums[r][h] = (lanes){0}, counts[r][h] = (words){0};
    for (size_t i = 0; i < n; i++) {
        for (int h = 0; h < HALVES; h++) __builtin_prefetch(weights + (i + AHEAD) * HALVES + h);
        for (int h = 0; h < HALVES; h++)
            for (int r = 0; r < rows; r++) {
                words w = weights[i * HALVES + h];
                if (type == INT8)
                    counts[r][h] = add_four(counts[r][h], w, input, i * num_rows + r);
                else if (type == BF16)
                    sums[r][h] = add_pair(sums[r][h], w, input, i * num_rows + r);
                else
                    sums[r][h] =
                        fused((lanes)w, spread(((const float *)input)[i * num_rows + r]), sums[r][h]);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) {
            if (type == INT8) { /* weights are 128 more than they mean */
                int32_t more = 128 * ((const int32_t *)header)[num_rows + r];
                lanes scale = load(scales + h * LANES) * ((const float *)header)[r];
                sums[r][h] = __builtin_convertvector((whole)(counts[r][h] - (uint32_t)more), lanes) * scale;
            }
            *(loose_lanes *)(y + r * stride + h * LANES) = sums[r][h];
        }
}

#define ROWS(count)                                                                                          \
    case count:                                                                                              \
        block(type, count, weights, scales, n, header, x, num_rows, out, stride);                            \
        break;

INLINE void product_of(int type, const words *weights, const float *scales, size_t n, const char *input,
                       int num_rows, float *y, size_t stride) {
    int lots = ceil_div(num_rows, BLOCK);
    for (int lot = 0; lot < lots; lot++) {
        int row = num_rows * lot / lots;
        const char *header = input + 4 * row;
        const char *x = input + header_size(type, num_rows) + row * input_size(type);
        float *out = y + row * stride;
        switch (num_rows * (lot + 1) / lots - row) {
            // clang-format off
            ROWS(1) ROWS(2) ROWS(3)
#ifdef __AVX512F__
            ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
            // clang-format on
        }
    }
}

/* y [num_rows][PANEL] of a panel of a map, of whose entries the first n are used. */
static __attribute__((noinline)) void product(int type, Map map, int panel, int n, const void *input,
                                              int num_rows, float *y, size_t stride) {
    const words *weights = (const words *)map.panels + (size_t)panel * map.entries * HALVES;
    if (type == INT8)
        product_of(INT8, weights, map.scales + panel * PANEL, n, input, num_rows, y, stride);
    else if (type == BF16)
        product_of(BF16, weights, NULL, n, input, num_rows, y, stride);
    else
        product_of(FP32, weights, NULL, n, input, num_rows, y, stride);
}
