/* What is computed of whole vectors and rows: sums and largest values, e^x, RMSNorm, rotary positions. */

#pragma once

#include "simd.h"

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
