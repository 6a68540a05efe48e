/* What vectors do where the compiler is told of no instruction, but for those of Arm: 4 lanes. */

#pragma once

#ifdef __aarch64__
#include <arm_neon.h>
#endif

/* a * b + c, rounded once. */
INLINE lanes fused(lanes a, lanes b, lanes c) {
#ifdef __aarch64__
    return (lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

INLINE lanes where(ints mask, lanes a, lanes b) { return (lanes)(((ints)a & mask) | ((ints)b & ~mask)); }

/* a > b ? a : b, and a < b ? a : b, which say what becomes of NaN. */
INLINE lanes larger(lanes a, lanes b) { return where(a > b, a, b); }

INLINE lanes smaller(lanes a, lanes b) { return where(a < b, a, b); }

INLINE lanes load_bf16(const uint16_t *from) {
    lanes values;
    for (int i = 0; i < LANES; i++) values[i] = from_bf16(from[i]);
    return values;
}

INLINE void store_bf16(lanes values, uint16_t *to) {
    for (int i = 0; i < LANES; i++) to[i] = to_bf16(values[i]);
}

/* Sums of four products each, of codes of weights and of inputs. */
INLINE words add_codes(words sums, words codes, int32_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (words)vdotq_s32((int32x4_t)sums, (int8x16_t)codes, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#else
    for (int k = 0; k < 4; k++)
        sums += (words)((ints)(codes << (24 - 8 * k)) >> 24) * (uint32_t)(int8_t)(x >> (8 * k));
    return sums;
#endif
}

/* `to` [LANES] rows, of LANES words each = `from` transposed; rows of `to` lie `stride` words apart. */
INLINE void transpose_square(const uint32_t *const *from, size_t at, uint32_t *to, size_t stride) {
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < LANES; k++) to[i * stride + k] = from[k][at + i];
}
