/* Numbers and vectors of them, for everything that is compiled: models/kernels/decode_step.c and train_ops.c. */

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16, HALVES = 2, PANEL = HALVES * LANES, FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
/* As many sums as the registers hold: BLOCK rows of a panel. */
#ifdef __AVX512F__
enum { BLOCK = 12 };
#else
enum { BLOCK = 3 };
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));
typedef float loose_lanes __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

INLINE size_t padded(size_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

INLINE uint32_t bits(float value) {
    uint32_t result;
    memcpy(&result, &value, 4);
    return result;
}

INLINE float number(uint32_t value) {
    float result;
    memcpy(&result, &value, 4);
    return result;
}

INLINE uint16_t to_bf16(float value) { /* to nearest, ties to even */
    return (uint16_t)((bits(value) + 0x7fff + ((bits(value) >> 16) & 1)) >> 16);
}

INLINE float from_bf16(uint16_t value) { return number((uint32_t)value << 16); }

/* a * b + c, rounded once. */
INLINE lanes fused(lanes a, lanes b, lanes c) {
#ifdef __AVX512F__
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    lanes result;
    for (int i = 0; i < LANES; i++) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return result;
#endif
}

INLINE lanes spread(float value) { return value - (lanes){0}; }

INLINE lanes load(const float *from) { return *(const loose_lanes *)from; }

/* a > b ? a : b, and a < b ? a : b, which say what becomes of NaN. */
INLINE lanes larger(lanes a, lanes b) {
#ifdef __AVX512F__
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    for (int i = 0; i < LANES; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}

INLINE lanes smaller(lanes a, lanes b) {
#ifdef __AVX512F__
    return (lanes)_mm512_min_ps((__m512)a, (__m512)b);
#else
    for (int i = 0; i < LANES; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
#endif
}

INLINE float total(lanes sums) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
}

INLINE float largest_lane(lanes x) {
    float most = -INFINITY;
    for (int i = 0; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* Of all values, or of their sizes; several at a time, as each has to wait for the one before. */
INLINE float largest_of(const float *x, int count, float most, uint32_t kept_bits) {
    enum { CHAINS = 4 };
    lanes found[CHAINS];
    int i = 0;
    for (int k = 0; k < CHAINS; k++) found[k] = spread(most);
    for (; i + CHAINS * LANES <= count; i += CHAINS * LANES)
        for (int k = 0; k < CHAINS; k++)
            found[k] = larger((lanes)((words)load(x + i + k * LANES) & kept_bits), found[k]);
    for (; i + LANES <= count; i += LANES)
        found[0] = larger((lanes)((words)load(x + i) & kept_bits), found[0]);
    most = largest_lane(larger(larger(found[0], found[1]), larger(found[2], found[3])));
    for (; i < count; i++) {
        float value = number(bits(x[i]) & kept_bits);
        most = value > most ? value : most;
    }
    return most;
}

INLINE float largest(const float *x, int count) { return largest_of(x, count, -INFINITY, 0xffffffffu); }

INLINE float largest_size(const float *x, int count) { return largest_of(x, count, 0, 0x7fffffffu); }

INLINE void store(lanes values, float *to) { *(loose_lanes *)to = values; }

/* Values [count] in FP32 or BF16 times a factor, to fp32; and fp32 back to them. */
INLINE void take(int type, const void *from, size_t at, int count, float factor, float *to) {
    if (type == BF16)
        for (int i = 0; i < count; i++) to[i] = from_bf16(((const uint16_t *)from)[at + i]) * factor;
    else
        for (int i = 0; i < count; i++) to[i] = ((const float *)from)[at + i] * factor;
}

INLINE void put(int type, const float *from, float factor, int count, void *to, size_t at) {
    if (type == BF16)
        for (int i = 0; i < count; i++) ((uint16_t *)to)[at + i] = to_bf16(from[i] * factor);
    else
        for (int i = 0; i < count; i++) ((float *)to)[at + i] = from[i] * factor;
}

INLINE lanes load_bf16(const uint16_t *from) {
#ifdef __AVX512F__
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
#else
    lanes values;
    for (int i = 0; i < LANES; i++) values[i] = from_bf16(from[i]);
    return values;
#endif
}

INLINE void store_bf16(lanes values, uint16_t *to) {
#ifdef __AVX512F__
    words all = (words)values;
    all = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
    _mm256_storeu_si256((void *)to, _mm512_cvtepi32_epi16((__m512i)all));
#else
    for (int i = 0; i < LANES; i++) to[i] = to_bf16(values[i]);
#endif
}

/* The last values, fewer than a vector has: these are in functions of their own lest the others be slow. */
static __attribute__((noinline)) lanes load_rest(int type, const void *from, size_t at, int left,
                                                 float behind) {
    float some[LANES];
    for (int i = 0; i < LANES; i++) some[i] = behind;
    take(type, from, at, left, 1, some);
    return load(some);
}

static __attribute__((noinline)) void store_rest(int type, lanes values, void *to, size_t at, int left) {
    float some[LANES];
    store(values, some);
    put(type, some, 1, left, to, at);
}

/* A vector of values in FP32 or BF16 of which `left` are left; another value stands behind them. */
INLINE lanes load_values(int type, const void *from, size_t at, int64_t left, float behind) {
    if (left < LANES) return load_rest(type, from, at, (int)left, behind);
    return type == FP32 ? load((const float *)from + at) : load_bf16((const uint16_t *)from + at);
}

/* The other way round: no more than are left. */
INLINE void store_values(int type, lanes values, void *to, size_t at, int64_t left) {
    if (left < LANES)
        store_rest(type, values, to, at, (int)left);
    else if (type == FP32)
        store(values, (float *)to + at);
    else
        store_bf16(values, (uint16_t *)to + at);
}

/* e^x of numbers up to 88, to two units in the last place, from the usual series after taking out a power of
   two; 0 where that is next to nothing, and never a number so small that processors are slow with it. */
INLINE lanes exponential(lanes x) {
    const lanes shift = spread(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    lanes exponent = fused(x, spread(1.44269504f), shift);
    lanes power = (lanes)(((words)exponent + 127u) << 23);
    exponent -= shift;
    lanes r = fused(exponent, spread(-0.693359375f), x);
    r = fused(exponent, spread(2.12194440e-4f), r);
    lanes series = fused(spread(1.9875691500e-4f), r, spread(1.3981999507e-3f));
    series = fused(series, r, spread(8.3334519073e-3f));
    series = fused(series, r, spread(4.1665795894e-2f));
    series = fused(series, r, spread(1.6666665459e-1f));
    series = fused(series, r, spread(5.0000001201e-1f));
    lanes y = (fused(series, r * r, r) + 1.0f) * power;
    return (lanes)((words)y & ~(words)(x < -80.0f));
}

INLINE lanes sigmoid(lanes x) { return 1.0f / (exponential(smaller(spread(0) - x, spread(88.0f))) + 1.0f); }

/* RMSNorm of `count` values: y = x * scale * weight; gives the scale, 1 / sqrt(mean(x^2) + epsilon). */
INLINE float normalise(const float *x, const float *weight, int count, float epsilon, float *y) {
    lanes squares = {0};
    int i = 0;
    for (; i + LANES <= count; i += LANES) squares = fused(load(x + i), load(x + i), squares);
    float sum = total(squares);
    for (; i < count; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)count + epsilon);
#pragma omp simd
    for (int i = 0; i < count; i++) y[i] = x[i] * scale * weight[i];
    return scale;
}

/* Rotary positions of a head: halves of x turn into each other; sines have the sign of the rotation. */
INLINE void rotate(const float *x, const float *cosines, const float *sines, int half, float *y) {
#pragma omp simd
    for (int i = 0; i < half; i++) {
        y[i] = x[i] * cosines[i] + x[i + half] * sines[i];
        y[i + half] = x[i + half] * cosines[i + half] + x[i] * sines[i + half];
    }
}

#ifdef __AVX512F__
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

/* 16 x 16 words, the other way round. */
INLINE void turn_square(__m512i *rows) {
    swap_blocks(rows, 8), swap_blocks(rows, 4), swap_blocks(rows, 2), swap_blocks(rows, 1);
}
#endif
