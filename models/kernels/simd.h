/* Numbers and vectors of them, for everything that is compiled: models/kernels/decode_step.c and train_ops.c.

   A vector is as wide as the processor's registers, and what is written with LANES is for any width; what
   takes instructions of its own is in the header of each instruction set. */

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* A register block, the sums of a product that registers hold, has BLOCK_ROWS rows and BLOCK_VECTORS vectors.
 */
#if defined(__AVX512F__) /* 32 registers of 16 floats */
enum { LANES = 16, BLOCK_ROWS = 12, BLOCK_VECTORS = 2 };
#elif defined(__AVX2__) && defined(__FMA__) /* 16 of 8 */
enum { LANES = 8, BLOCK_ROWS = 6, BLOCK_VECTORS = 2 };
#elif defined(__aarch64__)                  /* 32 of 4 */
enum { LANES = 4, BLOCK_ROWS = 6, BLOCK_VECTORS = 4 };
#else
enum { LANES = 4, BLOCK_ROWS = 6, BLOCK_VECTORS = 2 };
#endif
/* Weights lie in panels of 32 outputs, which are PARTS register blocks side by side. */
enum { PANEL = 32, VECTORS = PANEL / LANES, PARTS = VECTORS / BLOCK_VECTORS };
enum { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, Q8_0 = 4, Q4_0 = 5, Q4_1 = 6 };
/* Inputs of bf16 weights are pairs of bf16 where the processor multiplies such, else fp32. Those of weights
   of 8 or 4 bits are bytes where it adds four products of such, else 16 bits each. */
#ifdef __AVX512BF16__
enum { PAIRS_ARE_WORDS = 1 };
#else
enum { PAIRS_ARE_WORDS = 0 };
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || !defined(__AVX2__)
enum { WIDE_CODES = 0 };
#else
enum { WIDE_CODES = 1 };
#endif
/* Bytes of 8-bit weights are 128 more than they mean; a processor that multiplies signed ones takes that off
 * first. */
#ifdef __AVX2__
enum { SIGNED_CODES = 0 };
#else
enum { SIGNED_CODES = 1 };
#endif

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float loose_lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t loose_words __attribute__((vector_size(4 * LANES), aligned(4)));

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

INLINE float from_fp16(uint16_t value) { /* exact; there are no infinities in weights */
    return number((value & 0x8000u) << 16 | bits(number((value & 0x7fffu) << 13) * 0x1p112f));
}

INLINE lanes spread(float value) { return value - (lanes){0}; }

INLINE lanes load(const float *from) { return *(const loose_lanes *)from; }

INLINE void store(lanes values, float *to) { *(loose_lanes *)to = values; }

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#include "simd_plain.h"
#endif

/* Values [count] in FP32 or BF16 times a factor, to fp32; and fp32 back to them. */
INLINE void load_row(int type, const void *from, size_t at, int count, float factor, float *to) {
    if (type == BF16)
        for (int i = 0; i < count; i++) to[i] = from_bf16(((const uint16_t *)from)[at + i]) * factor;
    else
        for (int i = 0; i < count; i++) to[i] = ((const float *)from)[at + i] * factor;
}

INLINE void store_row(int type, const float *from, float factor, int count, void *to, size_t at) {
    if (type == BF16)
        for (int i = 0; i < count; i++) ((uint16_t *)to)[at + i] = to_bf16(from[i] * factor);
    else
        for (int i = 0; i < count; i++) ((float *)to)[at + i] = from[i] * factor;
}

/* The last values, fewer than a vector has: these are in functions of their own lest the others be slow. */
static __attribute__((noinline)) lanes load_rest(int type, const void *from, size_t at, int left,
                                                 float behind) {
    float some[LANES];
    for (int i = 0; i < LANES; i++) some[i] = behind;
    load_row(type, from, at, left, 1, some);
    return load(some);
}

static __attribute__((noinline)) void store_rest(int type, lanes values, void *to, size_t at, int left) {
    float some[LANES];
    store(values, some);
    store_row(type, some, 1, left, to, at);
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
