/* Products of models/kernels/matmul.h with weights in blocks of 32 inputs, as a GGUF file has them: codes of 8
   or 4 bits, a scale for each output and block (fp16), and in Q4_1 a value that is added to each weight.

   A panel's block is its codes, four inputs of each of the 32 outputs at a time, then the scales, then what is
   added. With 4 bits the lower halves of the bytes are inputs 0 to 15, the upper ones 16 to 31. Inputs are in 8
   bits with a scale for each block of a row. A block's sum of products is a whole number, exact in any order;
   blocks are added in fp32, one after another: a row's result is the same bits on every processor. */

#pragma once

#include "pack.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || !defined(__AVX2__)
#define ADDS_BYTES /* four products of bytes in 32 bits; else two of a byte and half of one in 16 bits */
#endif

INLINE size_t bytes_of_codes(int type) { return PANEL * BLOCK / (type == Q8_0 ? 1 : 2); }

INLINE size_t bytes_of_block(int type) { /* of a panel */
    return bytes_of_codes(type) + 2 * PANEL * (type == Q4_1 ? 2 : 1);
}

INLINE lanes load_fp16(const char *from) {
#if defined(__AVX512F__)
    return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const void *)from));
#else
    lanes values;
    for (int i = 0; i < LANES; i++) values[i] = from_fp16(((const uint16_t *)from)[i]);
    return values;
#endif
}

/* Sums and products of codes of weights, bytes or halves of them, and four of the inputs. */
INLINE words add_products(words sums, words codes, int32_t x) {
#if defined(__AVX512VNNI__)
    return (words)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(ADDS_BYTES)
    return add_codes(sums, codes, x);
#elif defined(__AVX512F__)
    __m512i products = _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(x));
    return (words)_mm512_add_epi16((__m512i)sums, products);
#else
    __m256i products = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(x));
    return (words)_mm256_add_epi16((__m256i)sums, products);
#endif
}

/* Sums of 16 bits, which hold those of a block with halves of bytes, in 32 bits times a factor. */
INLINE words widened(words sums, int16_t factor) {
#if defined(ADDS_BYTES)
    return sums * (uint32_t)factor;
#elif defined(__AVX512F__)
    return (words)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(factor));
#else
    return (words)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(factor));
#endif
}

#ifdef ADDS_BYTES
enum { BYTES_ARE_HALVED = 0 };
#else
enum { BYTES_ARE_HALVED = 1 };
#endif

enum { HALVES = 0x0f0f0f0f, SIGNS = (int)0x80808080 };

/* y [rows][PANEL], its rows `stride` apart, of the input's rows from `first` on: some of a panel's vectors. */
INLINE void rows_of_blocks(int type, int rows, int from, int vectors, const char *weights, int n, Input input,
                           int first, float *y, size_t stride) {
    lanes sums[BLOCK_ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = (lanes){0};
    size_t size = bytes_of_block(type), row = row_of(input.room) * 4;
    const char *inputs = entries_of(BLOCKS, input, first);
    for (int b = 0; b < n; b++, weights += size, inputs += sizeof(InputBlock)) {
        words lower[BLOCK_ROWS][VECTORS], upper[BLOCK_ROWS][VECTORS];
        for (size_t line = 0; line < size * vectors / VECTORS; line += 64)
            __builtin_prefetch(weights + AHEAD * sizeof(words) * VECTORS + line);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) lower[r][v] = upper[r][v] = (words){0};
        for (int step = 0, steps = type == Q8_0 ? 8 : 4; step < steps; step++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                words w = ((const words *)weights)[step * VECTORS + from + v];
                if (type == Q8_0 && SIGNED_CODES) w ^= (uint32_t)SIGNS;
                int whole = type == Q8_0 && !BYTES_ARE_HALVED;
                words low = whole ? w : w & HALVES, high = w >> 4 & HALVES;
#pragma GCC unroll 12
                for (int r = 0; r < rows; r++) {
                    const int32_t *x = ((const InputBlock *)(inputs + r * row))->codes;
                    lower[r][v] = add_products(lower[r][v], low, x[step]);
                    if (type != Q8_0)
                        lower[r][v] = add_products(lower[r][v], high, x[step + 4]);
                    else if (!whole)
                        upper[r][v] = add_products(upper[r][v], high, x[step]);
                }
            }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const char *scales = weights + bytes_of_codes(type) + 2 * (from + v) * LANES;
            lanes scale = load_fp16(scales);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                const InputBlock *x = (const InputBlock *)(inputs + r * row);
                int32_t middle = type == Q4_0 ? 8 : type == Q8_0 && !SIGNED_CODES ? 128 : 0;
                words counts = widened(lower[r][v], 1) - (uint32_t)(middle * x->sum);
                if (type == Q8_0 && BYTES_ARE_HALVED) counts += widened(upper[r][v], 16);
                lanes products = __builtin_convertvector((ints)counts, lanes);
                sums[r][v] = fused(products, scale * spread(x->scale), sums[r][v]);
                if (type == Q4_1)
                    sums[r][v] = fused(load_fp16(scales + 2 * PANEL), spread(x->scaled_sum), sums[r][v]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) store(sums[r][v], y + r * stride + (from + v) * LANES);
}

/* Rows of a register block: their sums of codes and those of all blocks are at work at once. */
enum { ROWS_OF_BLOCKS = BLOCK_ROWS / 2 };

#define ROWS(count)                                                                                          \
    case count:                                                                                              \
        if (count <= ROWS_OF_BLOCKS)                                                                         \
            for (int from = 0; from < VECTORS; from += BLOCK_VECTORS)                                        \
                rows_of_blocks(type, count, from, BLOCK_VECTORS, weights, n, input, row, out, stride);       \
        break;

INLINE void by_blocks(int type, const char *weights, int n, Input input, float *y, size_t stride) {
    int rows = input.rows, groups = ceil_div(rows, ROWS_OF_BLOCKS);
    if (rows == 1) {
        rows_of_blocks(type, 1, 0, VECTORS, weights, n, input, 0, y, stride);
        return;
    }
    for (int group = 0; group < groups; group++) {
        int row = rows * group / groups;
        float *out = y + row * stride;
        switch (rows * (group + 1) / groups - row) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }
    }
}
#undef ROWS

/* A row of such a weight as the file has it, block after block of scale, what is added, and codes. */
INLINE void read_blocks(int type, const void *rows, size_t row, int count, float *to) {
    size_t codes = type == Q8_0 ? BLOCK : BLOCK / 2, before = type == Q4_1 ? 4 : 2;
    const uint8_t *block = (const uint8_t *)rows + row * (size_t)(count / BLOCK) * (before + codes);
    for (int b = 0; b < count / BLOCK; b++, block += before + codes, to += BLOCK) {
        uint16_t halves[2] = {0};
        memcpy(halves, block, before);
        float scale = from_fp16(halves[0]), more = from_fp16(halves[1]);
        for (int i = 0; i < BLOCK; i++) {
            const uint8_t *code = block + before + (type == Q8_0 ? i : i % (BLOCK / 2));
            int value = type == Q8_0 ? (int8_t)*code : *code >> (i < BLOCK / 2 ? 0 : 4) & 15;
            to[i] = scale * (float)(value - (type == Q4_0 ? 8 : 0)) + more;
        }
    }
}
