/* Register blocks of models/kernels/matmul.h where the registers hold twelve rows of a panel: AVX-512. */

#pragma once

/* y [rows][PANEL], its rows `stride` apart, of the input's rows from `first` on. `scales` of the outputs are
   INT8's. */
INLINE void block(int type, int rows, const words *weights, const float *scales, int n, Input input,
                  int first, float *y, size_t stride) {
    lanes sums[BLOCK_ROWS][VECTORS];
    words counts[BLOCK_ROWS][VECTORS]; /* INT8's, in a type of their own, else they are moved at every step */
    const char *x = entries_of(type, input, first);
    size_t row = row_of(input.room);
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < VECTORS; h++) sums[r][h] = (lanes){0}, counts[r][h] = (words){0};
    for (size_t i = 0; i < (size_t)n; i++) {
        for (int h = 0; h < VECTORS; h++) __builtin_prefetch(weights + (i + AHEAD) * VECTORS + h);
        for (int h = 0; h < VECTORS; h++)
            for (int r = 0; r < rows; r++) {
                words w = weights[i * VECTORS + h];
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
        for (int h = 0; h < VECTORS; h++) {
            if (type == INT8)
                sums[r][h] = dequantize(type, counts[r][h], input, first + r, scales + h * LANES);
            store(sums[r][h], y + r * stride + h * LANES);
        }
}

enum { HALF_BLOCK = BLOCK_ROWS / 2 };

/* `block` for INT4. An entry is for two of the input's: the lower halves of its bytes, and the upper ones,
   which count sixteen times. Their sums are apart, so that fewer have to wait for the one before. Drafts have
   such weights, which stay in a nearer cache. */
INLINE void block_of_halves(int rows, const words *weights, const float *scales, int n, Input input,
                            int first, float *y, size_t stride) {
    words lower[HALF_BLOCK][VECTORS], upper[HALF_BLOCK][VECTORS];
    const char *x = entries_of(INT8, input, first);
    size_t row = row_of(input.room);
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < VECTORS; h++) lower[r][h] = upper[r][h] = (words){0};
    for (size_t i = 0; i < (size_t)n / 2; i++) {
        for (int h = 0; h < VECTORS; h++) __builtin_prefetch(weights + (i + SOON) * VECTORS + h);
        for (int h = 0; h < VECTORS; h++)
            for (int r = 0; r < rows; r++) {
                words w = weights[i * VECTORS + h];
                lower[r][h] = add_four(lower[r][h], w & 0x0f0f0f0fu, x, 2 * i + r * row);
                upper[r][h] = add_four(upper[r][h], w & 0xf0f0f0f0u, x, 2 * i + 1 + r * row);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < VECTORS; h++) {
            words counts = lower[r][h] + (words)((ints)upper[r][h] >> 4);
            if (n % 2) {
                words w = weights[n / 2 * VECTORS + h];
                counts = add_four(counts, w & 0x0f0f0f0fu, x, (size_t)n - 1 + r * row);
            }
            store(dequantize(INT4, counts, input, first + r, scales + h * LANES), y + r * stride + h * LANES);
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
    int rows = input.rows, blocks = ceil_div(rows, type == INT4 ? HALF_BLOCK : BLOCK_ROWS);
    for (int b = 0; b < blocks; b++) {
        int row = rows * b / blocks;
        float *out = y + row * stride;
        switch (rows * (b + 1) / blocks - row) {
            // clang-format off
            ROWS(1) ROWS(2) ROWS(3)
            ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
            // clang-format on
        }
    }
}
