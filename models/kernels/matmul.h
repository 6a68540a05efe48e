/* Products of models/kernels/decode_step.c: of a weight with a few rows of inputs, as models/kernels/pack.h lays
   them out.

   A row's result is the same bits among any others: its sums run over the inputs in one order, and a product
   is fused with its sum where it says so and nowhere else. */

#pragma once

#include "pack.h"
#include "matmul_amx.h"

/* y [rows][PANEL], its rows `stride` apart, of the input's rows from `first` on. `scales` of the outputs are
   INT8's. */
INLINE void block(int type, int rows, const words *weights, const float *scales, int n, Input input,
                  int first, float *y, size_t stride) {
    lanes sums[BLOCK][HALVES];
    words counts[BLOCK][HALVES]; /* INT8's sums: in a type of their own, else they are moved at every step */
    const char *x = entries_of(type, input, first);
    size_t row = row_of(input.room);
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) sums[r][h] = (lanes){0}, counts[r][h] = (words){0};
    for (size_t i = 0; i < (size_t)n; i++) {
        for (int h = 0; h < HALVES; h++) __builtin_prefetch(weights + (i + AHEAD) * HALVES + h);
        for (int h = 0; h < HALVES; h++)
            for (int r = 0; r < rows; r++) {
                words w = weights[i * HALVES + h];
                size_t at = i + r * row;
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
            if (type == INT8) sums[r][h] = meaning(type, counts[r][h], input, first + r, scales + h * LANES);
            store(sums[r][h], y + r * stride + h * LANES);
        }
}

enum { HALF_BLOCK = (BLOCK + 1) / 2 };

/* `block` for INT4. An entry is for two of the input's: the lower halves of its bytes, and the upper ones,
   which count sixteen times. Their sums are apart, so that fewer have to wait for the one before. Drafts have
   such weights, which stay in a nearer cache. */
INLINE void block_of_halves(int rows, const words *weights, const float *scales, int n, Input input,
                            int first, float *y, size_t stride) {
    words lower[HALF_BLOCK][HALVES], upper[HALF_BLOCK][HALVES];
    const char *x = entries_of(INT8, input, first);
    size_t row = row_of(input.room);
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) lower[r][h] = upper[r][h] = (words){0};
    for (size_t i = 0; i < (size_t)n / 2; i++) {
        for (int h = 0; h < HALVES; h++) __builtin_prefetch(weights + (i + SOON) * HALVES + h);
        for (int h = 0; h < HALVES; h++)
            for (int r = 0; r < rows; r++) {
                words w = weights[i * HALVES + h];
                lower[r][h] = add_four(lower[r][h], w & 0x0f0f0f0fu, x, 2 * i + r * row);
                upper[r][h] = add_four(upper[r][h], w & 0xf0f0f0f0u, x, 2 * i + 1 + r * row);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++) {
            words counts = lower[r][h] + (words)((whole)upper[r][h] >> 4);
            if (n % 2) {
                words w = weights[n / 2 * HALVES + h];
                counts = add_four(counts, w & 0x0f0f0f0fu, x, (size_t)n - 1 + r * row);
            }
            store(meaning(INT4, counts, input, first + r, scales + h * LANES), y + r * stride + h * LANES);
        }
}

#define ROWS(count)                                                                                          \
    case count:                                                                                              \
        if (type != INT4)                                                                                    \
            block(type, count, weights, scales, n, input, row, out, stride);                                 \
        else if (count <= HALF_BLOCK)                                                                        \
            block_of_halves(count, weights, scales, n, input, row, out, stride);                             \
        break;

INLINE void by_vectors(int type, const words *weights, const float *scales, int n, Input input, float *y,
                       size_t stride) {
    int rows = input.rows, lots = ceil_div(rows, type == INT4 ? HALF_BLOCK : BLOCK);
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

/* y [rows][PANEL] of a panel, of whose entries the first n are used, after `begin_tiles` for the input. */
INLINE void product_of(int type, const words *weights, const float *scales, int n, Input input, float *y,
                       size_t stride) {
#ifdef MULTIPLIES_TILES
    /* BF16's sums run in another order there, for a single row, too. */
    if (nestling_has_tiles && (type == BF16 || (type == INT8 && input.rows > 1))) {
        by_tiles(type, weights, scales, n, input, y, stride);
        return;
    }
#endif
    by_vectors(type, weights, scales, n, input, y, stride);
}

/* The same of a map's panel. */
static __attribute__((noinline)) void product(Map map, int panel, int n, Input input, float *y,
                                              size_t stride) {
    const words *weights = (const words *)map.panels + (size_t)panel * map.entries * HALVES;
    if (map.type == INT4)
        product_of(INT4, weights, map.scales + panel * PANEL, n, input, y, stride);
    else if (map.type == INT8)
        product_of(INT8, weights, map.scales + panel * PANEL, n, input, y, stride);
    else if (map.type == BF16)
        product_of(BF16, weights, NULL, n, input, y, stride);
    else
        product_of(FP32, weights, NULL, n, input, y, stride);
}
