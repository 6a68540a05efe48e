/* What lies between the matrix products of a training step, forward and backward: RMSNorm, rotary positions,
   attention, SwiGLU, cross-entropy. models/compiled/training.py calls them.

   Each reads its arguments from memory once, which torch's operations do a dozen times. Values are in FP32 or
   BF16, sums and whatever lies between in fp32. Sums are taken in one order, whatever the number of threads.
 */

#include <omp.h>
#include <stdlib.h>

#include "attention.h"
#include "numbers.h"

/* Sums over all rows, such as a weight's gradient, are those of so many parts of the rows. */
enum { PARTS = 64 };

/* ---------------------------------------------------------------- RMSNorm: y = x * inverse * weight */

typedef struct {
    int32_t type, result_type; /* of x; of y and its gradient */
    int64_t rows, size;
    float epsilon;
    const void *x;
    const float *weight;
    float *inverse; /* [rows]: 1 / sqrt(mean(x^2) + epsilon) */
    void *y;
    /* Of the backward pass alone; the other gradient is that of x where it is read as it is, or NULL. */
    const void *y_grad, *other_grad;
    void *x_grad;
    float *weight_grad;
} Norm;

static void normalise_row(const Norm *of, int64_t row, float *x) {
    int size = (int)of->size;
    take(of->type, of->x, (size_t)(row * of->size), size, 1, x);
    of->inverse[row] = normalise(x, of->weight, size, of->epsilon, x);
    put(of->result_type, x, 1, size, of->y, (size_t)(row * of->size));
}

/* x_grad = other_grad + inverse * (g - unit * mean(g * unit)); g = y_grad * weight, unit = x * inverse. */
static void normalise_row_back(const Norm *of, int64_t row, float *x, float *grad, float *weight_grad) {
    int size = (int)of->size;
    size_t at = (size_t)(row * of->size);
    float inverse = of->inverse[row], along = 0;
    take(of->type, of->x, at, size, inverse, x);
    take(of->result_type, of->y_grad, at, size, 1, grad);
#pragma omp simd reduction(+ : along)
    for (int i = 0; i < size; i++) {
        float both = grad[i] * x[i];
        weight_grad[i] += both;
        along += both * of->weight[i];
    }
    along /= (float)size;
#pragma omp simd
    for (int i = 0; i < size; i++) x[i] = (grad[i] * of->weight[i] - x[i] * along) * inverse;
    if (of->other_grad) {
        take(of->type, of->other_grad, at, size, 1, grad);
#pragma omp simd
        for (int i = 0; i < size; i++) x[i] += grad[i];
    }
    put(of->type, x, 1, size, of->x_grad, at);
}

/* Returns 0, or 1 if there is no memory; so do those below. */
int nestling_norm(const Norm *of, int backward, int num_threads) {
    size_t line = padded((size_t)of->size);
    float *memory = aligned_alloc(64, 4 * line * (2 * (size_t)num_threads + PARTS));
    if (memory == NULL) return 1;
    float *weight_grads = memory + 2 * line * (size_t)num_threads;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int part = 0; part < PARTS; part++) {
        float *x = memory + 2 * line * (size_t)omp_get_thread_num(),
              *weight_grad = weight_grads + line * part;
        if (backward) memset(weight_grad, 0, 4 * line);
        for (int64_t row = of->rows * part / PARTS; row < of->rows * (part + 1) / PARTS; row++)
            if (backward)
                normalise_row_back(of, row, x, x + line, weight_grad);
            else
                normalise_row(of, row, x);
    }
    if (backward) {
        memset(of->weight_grad, 0, 4 * (size_t)of->size);
        for (int part = 0; part < PARTS; part++)
            for (int i = 0; i < of->size; i++) of->weight_grad[i] += weight_grads[line * part + i];
    }
    free(memory);
    return 0;
}

/* ---------------------------------------------------------------- rotary positions */

/* Queries, keys and values of a token lie side by side in `together`. */
typedef struct {
    int32_t type, rows, positions, heads, groups, size;
    const float *cosines, *sines; /* [positions][size], sines with the sign of the rotation */
    void *together;               /* [rows][positions][heads + 2 groups][size] */
    Heads queries, keys, values;
} Placed;

INLINE void rotate_back(const float *y, const float *cosines, const float *sines, int half, float *x) {
#pragma omp simd
    for (int i = 0; i < half; i++) {
        x[i] = y[i] * cosines[i] + y[i + half] * sines[i + half];
        x[i + half] = y[i + half] * cosines[i + half] + y[i] * sines[i];
    }
}

/* From `together` to queries and keys, rotated, and values; or `backward` their gradients to its gradient. */
int nestling_place(const Placed *of, int backward, int num_threads) {
    int size = of->size, each = of->heads + 2 * of->groups;
    float *memory = aligned_alloc(64, 8 * padded((size_t)size) * (size_t)num_threads);
    if (memory == NULL) return 1;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t token = 0; token < (int64_t)of->rows * of->positions; token++) {
        float *x = memory + 2 * padded((size_t)size) * (size_t)omp_get_thread_num(),
              *y = x + padded((size_t)size);
        int row = (int)(token / of->positions), position = (int)(token % of->positions);
        const float *cosines = of->cosines + (size_t)position * size,
                    *sines = of->sines + (size_t)position * size;
        for (int i = 0; i < each; i++) {
            int head = i < of->heads ? i : (i - of->heads) % of->groups, turns = i < of->heads + of->groups;
            Heads heads = i < of->heads ? of->queries : turns ? of->keys : of->values;
            size_t here = (size_t)(token * each + i) * (size_t)size,
                   there = at_head(heads, row, head, position);
            if (backward) {
                take(of->type, heads.values, there, size, 1, x);
                if (turns) rotate_back(x, cosines, sines, size / 2, y);
                put(of->type, turns ? y : x, 1, size, of->together, here);
            } else {
                take(of->type, of->together, here, size, 1, x);
                if (turns) rotate(x, cosines, sines, size / 2, y);
                put(of->type, turns ? y : x, 1, size, heads.values, there);
            }
        }
    }
    free(memory);
    return 0;
}

/* ---------------------------------------------------------------- SwiGLU: y = silu(gate) * up */

typedef struct {
    int32_t type;
    int64_t count;
    const void *gate, *up;
    void *y;
    const void *y_grad; /* of the backward pass, as the rest */
    void *gate_grad, *up_grad;
} Gated;

INLINE void gate_values(const Gated *of, int backward, int64_t first, int count) {
    float gate[PANEL], up[PANEL], grad[PANEL], y[PANEL];
    take(of->type, of->gate, (size_t)first, count, 1, gate);
    take(of->type, of->up, (size_t)first, count, 1, up);
    if (backward) take(of->type, of->y_grad, (size_t)first, count, 1, grad);
    for (int i = 0; i < PANEL; i += LANES) {
        lanes g = load(gate + i), open = 1.0f / (exponential(smaller(spread(0) - g, spread(88.0f))) + 1.0f);
        lanes silu = g * open, u = load(up + i);
        if (backward) {
            lanes d = load(grad + i);
            store(d * u * (open + silu * (1.0f - open)), gate + i);
            store(d * silu, up + i);
        } else {
            store(silu * u, y + i);
        }
    }
    if (backward) {
        put(of->type, gate, 1, count, of->gate_grad, (size_t)first);
        put(of->type, up, 1, count, of->up_grad, (size_t)first);
    } else {
        put(of->type, y, 1, count, of->y, (size_t)first);
    }
}

int nestling_gate(const Gated *of, int backward, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t panel = 0; panel < of->count / PANEL; panel++)
        gate_values(of, backward, panel * PANEL, PANEL);
    if (of->count % PANEL) gate_values(of, backward, of->count / PANEL * PANEL, (int)(of->count % PANEL));
    return 0;
}

/* ---------------------------------------------------------------- cross-entropy */

typedef struct {
    int32_t type;
    int64_t rows, size;
    const void *logits;
    const int64_t *labels; /* of each row; one below 0 counts for nothing */
    float *losses, *log_sums;
    const float *loss_grads; /* of the backward pass, as the rest */
    void *logits_grad;
} Entropy;

/* -log softmax(logits)[label] of each row; or the gradient, loss_grad * (softmax(logits) - [label]). */
int nestling_cross_entropy(const Entropy *of, int backward, int num_threads) {
    int size = (int)of->size;
    size_t line = padded((size_t)size);
    float *memory = aligned_alloc(64, 4 * line * (size_t)num_threads);
    if (memory == NULL) return 1;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < of->rows; row++) {
        float *x = memory + line * (size_t)omp_get_thread_num();
        size_t at = (size_t)(row * of->size);
        int64_t label = of->labels[row];
        take(of->type, of->logits, at, size, 1, x);
        for (size_t i = (size_t)size; i < line; i++) x[i] = -INFINITY;
        if (backward) {
            float grad = label < 0 ? 0 : of->loss_grads[row];
            for (size_t i = 0; i < line; i += LANES)
                store(exponential(load(x + i) - of->log_sums[row]) * grad, x + i);
            if (label >= 0) x[label] -= grad;
            put(of->type, x, 1, size, of->logits_grad, at);
        } else {
            float most = largest(x, size), own = label < 0 ? 0 : x[label];
            lanes sums = {0};
            for (size_t i = 0; i < line; i += LANES) sums += exponential(load(x + i) - most);
            of->log_sums[row] = most + logf(total(sums));
            of->losses[row] = label < 0 ? 0 : of->log_sums[row] - own;
        }
    }
    free(memory);
    return 0;
}
