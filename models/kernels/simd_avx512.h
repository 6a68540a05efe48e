/* What vectors do by instructions of AVX-512 of their own: 16 lanes. */

#pragma once

#include <immintrin.h>

/* a * b + c, rounded once. */
INLINE lanes fused(lanes a, lanes b, lanes c) {
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

/* a > b ? a : b, and a < b ? a : b, which say what becomes of NaN. */
INLINE lanes larger(lanes a, lanes b) { return (lanes)_mm512_max_ps((__m512)a, (__m512)b); }

INLINE lanes smaller(lanes a, lanes b) { return (lanes)_mm512_min_ps((__m512)a, (__m512)b); }

INLINE lanes load_bf16(const uint16_t *from) {
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
}

INLINE void store_bf16(lanes values, uint16_t *to) { /* to nearest, ties to even */
    words all = (words)values;
    all = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
    _mm256_storeu_si256((void *)to, _mm512_cvtepi32_epi16((__m512i)all));
}

/* Inputs of bf16 weights: a pair is one word where the processor multiplies such pairs, else two fp32
 * numbers. */
INLINE lanes add_pair(lanes sum, words pair, const void *x, size_t i) {
#ifdef __AVX512BF16__
    __m512i both = _mm512_set1_epi32(((const int32_t *)x)[i]);
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)both);
#else
    const float *both = (const float *)x + 2 * i;
    sum = fused((lanes)(pair << 16), spread(both[0]), sum);
    return fused((lanes)(pair & 0xffff0000u), spread(both[1]), sum);
#endif
}

/* Sums of four products each: of unsigned bytes, which weights are here, and signed ones. Without VNNI these
   are widened to 16 bits, the first and third before the second and fourth, which makes every sum exact. */
INLINE words add_four(words sums, words four, const void *x, size_t i) {
#ifdef __AVX512VNNI__
    __m512i all = _mm512_set1_epi32(((const int32_t *)x)[i]);
    return (words)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)four, all);
#else
    const int32_t *pairs = (const int32_t *)x + 2 * i;
    words even = four & 0x00ff00ffu, odd = four >> 8 & 0x00ff00ffu;
    sums += (words)_mm512_madd_epi16((__m512i)even, _mm512_set1_epi32(pairs[0]));
    return sums + (words)_mm512_madd_epi16((__m512i)odd, _mm512_set1_epi32(pairs[1]));
#endif
}

/* Of 16 x 16 words: in every two by two blocks of this size, those beside the diagonal change places. */
INLINE void swap_blocks(__m512i *rows, int size) {
    const __m512i each = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 right = size == 8 ? 0xff00 : size == 4 ? 0xf0f0 : size == 2 ? 0xcccc : 0xaaaa;
    const __m512i above = _mm512_mask_add_epi32(each, right, each, _mm512_set1_epi32(LANES - size));
    const __m512i below = _mm512_add_epi32(above, _mm512_set1_epi32(size));
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & size)) {
            __m512i a = rows[i], b = rows[i + size];
            rows[i] = _mm512_permutex2var_epi32(a, above, b);
            rows[i + size] = _mm512_permutex2var_epi32(a, below, b);
        }
}

/* `to` [LANES] rows, of LANES words each = `from` transposed; rows of `to` lie `stride` words apart. */
INLINE void transpose_square(const uint32_t *const *from, size_t at, uint32_t *to, size_t stride) {
    __m512i rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = _mm512_loadu_si512(from[i] + at);
    swap_blocks(rows, 8), swap_blocks(rows, 4), swap_blocks(rows, 2), swap_blocks(rows, 1);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + i * stride, rows[i]);
}
