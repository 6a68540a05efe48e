/* What vectors do by instructions of AVX2 of their own: 8 lanes. */

#pragma once

#include <immintrin.h>

/* a * b + c, rounded once. */
INLINE lanes fused(lanes a, lanes b, lanes c) {
    return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

/* a > b ? a : b, and a < b ? a : b, which say what becomes of NaN. */
INLINE lanes larger(lanes a, lanes b) { return (lanes)_mm256_max_ps((__m256)a, (__m256)b); }

INLINE lanes smaller(lanes a, lanes b) { return (lanes)_mm256_min_ps((__m256)a, (__m256)b); }

INLINE lanes load_bf16(const uint16_t *from) {
    return (lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16);
}

INLINE void store_bf16(lanes values, uint16_t *to) { /* to nearest, ties to even */
    words all = (words)values;
    all = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
    /* Packing goes by halves of a vector, so the quarters that count are the first and the third. */
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)all, (__m256i)all), 0x08);
    _mm_storeu_si128((void *)to, _mm256_castsi256_si128(packed));
}

/* AVX-VNNI multiplies bytes and adds four products in 32 bits. Without it the instruction for bytes adds in
   16 bits, where it saturates: bytes are widened instead, and pairs of 16 bits multiplied, which is exact. */
INLINE words add_codes(words sums, words codes, int32_t x) {
#ifdef __AVXVNNI__
    return (words)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(x));
#else
    return sums + (words)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(x));
#endif
}

/* `to` [LANES] rows, of LANES words each = `from` transposed; rows of `to` lie `stride` words apart. */
INLINE void transpose_square(const uint32_t *const *from, size_t at, uint32_t *to, size_t stride) {
    __m256 a[LANES], b[LANES];
    /* Each pair of rows is interleaved, then each pair of pairs, then halves of vectors change places. */
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i++) a[i] = _mm256_loadu_ps((const float *)from[i] + at);
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int pair = i / 2 * 4 + i % 2; /* 0, 1, 4, 5 */
        a[2 * i] = _mm256_shuffle_ps(b[pair], b[pair + 2], 0x44);
        a[2 * i + 1] = _mm256_shuffle_ps(b[pair], b[pair + 2], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps((float *)to + i * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps((float *)to + (i + 4) * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}
