/* How a pass of models/kernels/decode_step.c chooses a token and goes on: the likeliest, a draw, or the
   winner of a race, whose noise another model shares. Distributions are those of
   models/decode/sampling/params.py: temperature, top-k, top-p and min-p, in this order. */

#include <limits.h>

#include "matmul.h"

typedef struct {
    float temperature, top_p, min_p; /* temperature 0: the likeliest token; 1 and 0 keep all */
    int32_t top_k;                   /* 0 keeps all */
    const double *uniforms;          /* one for each token to draw, or NULL */
    const double *races; /* [tokens to draw][vocabulary]: the largest probability times this wins; or NULL */
    int64_t vocabulary;
} Sampling;

/* The number of probabilities from a bound on, and their sum. */
typedef struct {
    int count;
    float mass;
} Largest;

INLINE Largest at_least(const float *p, int count, float least) {
    int number = 0;
    float mass = 0;
#pragma omp simd reduction(+ : number, mass)
    for (int i = 0; i < count; i++) {
        number += p[i] >= least;
        mass += p[i] >= least ? p[i] : 0;
    }
    return (Largest){number, mass};
}

INLINE void divide(float *p, int count, float by) {
#pragma omp simd
    for (int i = 0; i < count; i++) p[i] /= by;
}

/* Keep the largest, until they are `most` or come to `mass`; of equal ones the first. */
static void keep_largest(float *p, int count, int most, float mass) {
    /* Positive numbers are in the order of their bits: from `low` on they suffice, from `high` on not. */
    uint32_t low = 0, high = bits(INFINITY);
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        Largest some = at_least(p, count, number(middle));
        if (some.count >= most || some.mass >= mass)
            low = middle;
        else
            high = middle;
    }
    float least = number(low);
    Largest larger = at_least(p, count, number(high));
    float room = most < INT_MAX ? (float)(most - larger.count) : ceilf((mass - larger.mass) / least);
    float kept = larger.mass;
    for (int i = 0, equal = 0; i < count; i++) {
        if (p[i] > least) continue;
        if (p[i] == least && (float)equal++ < room)
            kept += p[i];
        else
            p[i] = 0;
    }
    divide(p, count, kept);
}

/* Turn logits into probabilities, in place. */
static void to_probs(const Sampling *sampling, float *x, int count) {
    float most = largest(x, count);
    lanes sums = {0};
    for (int i = 0; i < count; i += LANES) {
        lanes logits = load_values(FP32, x, (size_t)i, count - i, -INFINITY);
        lanes some = exponential((logits - most) / sampling->temperature);
        store_values(FP32, some, x, (size_t)i, count - i);
        sums += some;
    }
    divide(x, count, total(sums));
    if (0 < sampling->top_k && sampling->top_k < count) keep_largest(x, count, sampling->top_k, INFINITY);
    if (sampling->top_p < 1) keep_largest(x, count, INT_MAX, sampling->top_p);
    if (sampling->min_p > 0) {
        float least = sampling->min_p * largest(x, count);
        float mass = at_least(x, count, least).mass;
#pragma omp simd
        for (int i = 0; i < count; i++) x[i] = x[i] < least ? 0 : x[i] / mass;
    }
}

INLINE double mass_of(const float *p, int count) {
    double mass = 0;
#pragma omp simd reduction(+ : mass)
    for (int i = 0; i < count; i++) mass += p[i];
    return mass;
}

/* The token whose part of a line, as long as all probabilities, has the point that `uniform` marks. */
static int invert(const float *p, int count, double uniform) {
    double all = 0;
    for (int i = 0; i < count; i += PANEL) all += mass_of(p + i, i + PANEL < count ? PANEL : count - i);
    double point = uniform * all;
    int token = 0;
    for (; token + PANEL < count; token += PANEL) {
        double mass = mass_of(p + token, PANEL);
        if (point < mass) break;
        point -= mass;
    }
    for (; token < count; token++) {
        if (point < p[token]) return token;
        point -= p[token];
    }
    while (--token > 0 && p[token] == 0) {
    } /* rounding put the point behind the last one that is possible */
    return token;
}

/* The first of the largest. */
static int likeliest(const float *x, int count) {
    float most = largest(x, count);
    for (int i = 0; i < count; i++)
        if (x[i] == most) return i;
    return 0; /* no number is among them */
}

static int winner(const float *p, int count, const int64_t *ids, const double *races) {
    int first = 0;
    double most = 0;
    for (int i = 0; i < count; i++) {
        double value = p[i] * races[ids ? ids[i] : i];
        if (value > most) most = value, first = i;
    }
    return first;
}

/* Token number `draw` of a request, by the logits of those with these ids, or of all; they become
   probabilities. */
static int64_t choose(const Sampling *sampling, float *x, int count, const int64_t *ids, int draw) {
    int index;
    if (sampling->temperature == 0) {
        index = likeliest(x, count);
    } else {
        to_probs(sampling, x, count);
        index = sampling->races ? winner(x, count, ids, sampling->races + sampling->vocabulary * draw)
                                : invert(x, count, sampling->uniforms[draw]);
    }
    return ids ? ids[index] : index;
}
