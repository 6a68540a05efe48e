/* Products of models/kernels/decode_step.c: of a weight with a few rows of inputs, as models/kernels/pack.h
   lays them out.

   A row's result is the same bits among any others: its sums run over the inputs in one order, and a product
   is fused with its sum where it says so and nowhere else. */

#pragma once

#include "matmul_amx.h"
#include "matmul_blocks.h"
#include "pack.h"

#ifdef __AVX512F__
#include "matmul_avx512.h"
#else
#include "matmul_steps.h"
#endif

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

/* The same of a map's panel. Its code is long: gcc would make copies of it for types that are known. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((noclone))
#endif
static
    __attribute__((noinline)) void product(Map map, int panel, int n, Input input, float *y, size_t stride) {
    if (is_blocks((int)map.type)) {
        const char *blocks = (const char *)map.panels + (size_t)panel * map.entries * bytes_of_block((int)map.type);
        int count = n / (int)(sizeof(InputBlock) / 4);
        if (map.type == Q8_0)
            by_blocks(Q8_0, blocks, count, input, y, stride);
        else if (map.type == Q4_0)
            by_blocks(Q4_0, blocks, count, input, y, stride);
        else
            by_blocks(Q4_1, blocks, count, input, y, stride);
        return;
    }
    const words *weights = (const words *)map.panels + (size_t)panel * map.entries * VECTORS;
    if (map.type == INT4)
        product_of(INT4, weights, map.scales + panel * PANEL, n, input, y, stride);
    else if (map.type == INT8)
        product_of(INT8, weights, map.scales + panel * PANEL, n, input, y, stride);
    else if (map.type == BF16)
        product_of(BF16, weights, NULL, n, input, y, stride);
    else
        product_of(FP32, weights, NULL, n, input, y, stride);
}
