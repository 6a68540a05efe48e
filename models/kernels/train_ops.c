/* What lies between the matrix products of a training step, forward and backward: RMSNorm, rotary positions,
   attention, SwiGLU, cross-entropy, acceptance, KL, cosines. models/kernels/train_ops.py and train_losses.py call them.

   Each reads its arguments from memory once, which torch's operations do a dozen times. Values are in FP32 or
   BF16, sums and whatever lies between in fp32. Sums are taken in one order, whatever the number of threads.
 */

#include <omp.h>
#include <stdlib.h>

#include "train_attention.h"
#include "train_merge.h"

/* Sums over all rows, such as a weight's gradient, add up those of this many parts of the rows. */
enum { SLICES = 64 };
/* Values that a thread walks over before it asks for more. */
enum { GATES = 4096 };

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
    load_row(of->type, of->x, (size_t)(row * of->size), size, 1, x);
    of->inverse[row] = normalise(x, of->weight, size, of->epsilon, x);
    store_row(of->result_type, x, 1, size, of->y, (size_t)(row * of->size));
}

/* x_grad = other_grad + inverse * (g - unit * mean(g * unit)); g = y_grad * weight, unit = x * inverse. */
static void normalise_row_back(const Norm *of, int64_t row, float *x, float *grad, float *weight_grad) {
    int size = (int)of->size;
    size_t at = (size_t)(row * of->size);
    float inverse = of->inverse[row], along = 0;
    load_row(of->type, of->x, at, size, inverse, x);
    load_row(of->result_type, of->y_grad, at, size, 1, grad);
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
        load_row(of->type, of->other_grad, at, size, 1, grad);
#pragma omp simd
        for (int i = 0; i < size; i++) x[i] += grad[i];
    }
    store_row(of->type, x, 1, size, of->x_grad, at);
}

/* Returns 0, or 1 if there is no memory; so do those below. */
int nestling_norm(const Norm *of, int backward, int num_threads) {
    size_t line = padded((size_t)of->size);
    float *memory = aligned_alloc(64, 4 * line * (2 * (size_t)num_threads + SLICES));
    if (memory == NULL) return 1;
    float *weight_grads = memory + 2 * line * (size_t)num_threads;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int part = 0; part < SLICES; part++) {
        float *x = memory + 2 * line * (size_t)omp_get_thread_num(),
              *weight_grad = weight_grads + line * part;
        if (backward) memset(weight_grad, 0, 4 * line);
        for (int64_t row = of->rows * part / SLICES; row < of->rows * (part + 1) / SLICES; row++)
            if (backward)
                normalise_row_back(of, row, x, x + line, weight_grad);
            else
                normalise_row(of, row, x);
    }
    if (backward) {
        memset(of->weight_grad, 0, 4 * (size_t)of->size);
        for (int part = 0; part < SLICES; part++)
            for (int i = 0; i < of->size; i++) of->weight_grad[i] += weight_grads[line * part + i];
    }
    free(memory);
    return 0;
}

/* ---------------------------------------------------------------- rotary positions */

/* Queries, keys and values of a token lie side by side in `packed`. */
typedef struct {
    int32_t type, rows, positions, heads, groups, size;
    const float *cosines, *sines; /* [positions][size], sines with the sign of the rotation */
    void *packed;                 /* [rows][positions][heads + 2 groups][size] */
    Heads queries, keys, values;
} Placed;

INLINE void rotate_back(const float *y, const float *cosines, const float *sines, int half, float *x) {
#pragma omp simd
    for (int i = 0; i < half; i++) {
        x[i] = y[i] * cosines[i] + y[i + half] * sines[i + half];
        x[i + half] = y[i + half] * cosines[i + half] + y[i] * sines[i];
    }
}

/* From `packed` to queries and keys, rotated, and values; or `backward` their gradients to its gradient. */
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
                load_row(of->type, heads.values, there, size, 1, x);
                if (turns) rotate_back(x, cosines, sines, size / 2, y);
                store_row(of->type, turns ? y : x, 1, size, of->packed, here);
            } else {
                load_row(of->type, of->packed, here, size, 1, x);
                if (turns) rotate(x, cosines, sines, size / 2, y);
                store_row(of->type, turns ? y : x, 1, size, heads.values, there);
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

INLINE void gate_values(int type, const Gated *of, int backward, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i += LANES) {
        size_t at = (size_t)i;
        lanes gate = load_values(type, of->gate, at, end - i, 0),
              up = load_values(type, of->up, at, end - i, 0), open = sigmoid(gate), silu = gate * open;
        if (backward) {
            lanes grad = load_values(type, of->y_grad, at, end - i, 0);
            store_values(type, grad * up * (open + silu * (1.0f - open)), of->gate_grad, at, end - i);
            store_values(type, grad * silu, of->up_grad, at, end - i);
        } else {
            store_values(type, silu * up, of->y, at, end - i);
        }
    }
}

int nestling_gate(const Gated *of, int backward, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t first = 0; first < of->count; first += GATES) {
        int64_t end = first + GATES < of->count ? first + GATES : of->count;
        if (of->type == BF16)
            gate_values(BF16, of, backward, first, end);
        else
            gate_values(FP32, of, backward, first, end);
    }
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

INLINE float largest_value(int type, const void *values, size_t at, int64_t size) {
    lanes highest = spread(-INFINITY);
    for (int64_t i = 0; i < size; i += LANES)
        highest = larger(highest, load_values(type, values, at + (size_t)i, size - i, -INFINITY));
    return largest_lane(highest);
}

INLINE void entropy_of_row(int type, const Entropy *of, int backward, int64_t row) {
    int64_t size = of->size, label = of->labels[row];
    size_t at = (size_t)(row * size);
    float own = 0, grad = backward && label >= 0 ? of->loss_grads[row] : 0;
    if (label >= 0) load_row(type, of->logits, at + (size_t)label, 1, 1, &own);
    if (backward) {
        float log_sum = of->log_sums[row];
        for (int64_t i = 0; i < size; i += LANES) {
            lanes x = load_values(type, of->logits, at + (size_t)i, size - i, 0);
            store_values(type, exponential(x - log_sum) * grad, of->logits_grad, at + (size_t)i, size - i);
        }
        if (label < 0) return;
        own = exponential(spread(own - log_sum))[0] * grad - grad;
        store_row(type, &own, 1, 1, of->logits_grad, at + (size_t)label);
    } else {
        float most = largest_value(type, of->logits, at, size);
        lanes sums = {0};
        for (int64_t i = 0; i < size; i += LANES)
            sums += exponential(load_values(type, of->logits, at + (size_t)i, size - i, -INFINITY) - most);
        of->log_sums[row] = most + logf(total(sums));
        of->losses[row] = label < 0 ? 0 : of->log_sums[row] - own;
    }
}

/* -log softmax(logits)[label] of each row; or the gradient, loss_grad * (softmax(logits) - [label]). */
int nestling_cross_entropy(const Entropy *of, int backward, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < of->rows; row++)
        if (of->type == BF16)
            entropy_of_row(BF16, of, backward, row);
        else
            entropy_of_row(FP32, of, backward, row);
    return 0;
}

/* ---------------------------------------------------------------- how near a draft q is to its target p */

typedef struct {
    int32_t type;
    const void *logits; /* or hidden states */
    int64_t row;        /* from one row to the next */
} Side;

enum { OVERLAP, FORWARD_KL, DIRECTION };

typedef struct {
    int32_t kind;
    Side target, draft;
    int64_t rows, size;
    float scale;              /* of the logits: 1 / temperature */
    float *values;            /* [rows] */
    void *slopes;             /* [rows][size]: gradients of the values, of the draft's type */
    const float *value_grads; /* of the backward pass, as the rest */
    void *draft_grad;
} Pair;

/* Logarithms below that of the smallest normal number count as it, so that 0 * -inf cannot arise. */
static const float LOG_TINY = -87.3365447f;

/* Values where x < y, else 0. */
INLINE lanes where_less(lanes x, lanes y, lanes values) { return (lanes)((words)values & (words)(x < y)); }

/* p [size], to be divided by its sum; gives the logarithm that takes scaled logits to that of p. */
INLINE float softmax_of(int type, Side side, int64_t row, int64_t size, float scale, float *p, float *sum) {
    size_t at = (size_t)(row * side.row);
    float most = largest_value(type, side.logits, at, size) * scale;
    lanes sums = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        lanes x = load_values(type, side.logits, at + (size_t)i, size - i, -INFINITY);
        lanes some = exponential(x * scale - most);
        store(some, p + i);
        sums += some;
    }
    *sum = total(sums);
    return most + logf(*sum);
}

/* The logarithms of a side's probabilities; past the end of the row they do not matter. */
INLINE lanes logarithms(int type, Side side, int64_t row, int64_t i, int64_t left, float scale,
                        float log_sum) {
    return load_values(type, side.logits, (size_t)(row * side.row + i), left, 0) * scale - log_sum;
}

INLINE void pair_of_row(int target_type, int draft_type, const Pair *of, int64_t row, float *p, float *q) {
    float sum_p, sum_q, log_sum_p = softmax_of(target_type, of->target, row, of->size, of->scale, p, &sum_p),
                        log_sum_q = softmax_of(draft_type, of->draft, row, of->size, of->scale, q, &sum_q);
    float of_p = 1.0f / sum_p, of_q = 1.0f / sum_q;
    lanes sums = {0}, all = {0}, kept = {0}, tiny = spread(LOG_TINY);
    /* From here on p is that part of p which pulls a logit of q: in an overlap q itself where it is less. */
    for (int64_t i = 0; i < of->size; i += LANES) {
        lanes ours = load(q + i) * of_q, theirs = load(p + i) * of_p, pull;
        if (of->kind == OVERLAP) {
            pull = where_less(ours, theirs, ours);
            sums += smaller(theirs, ours);
            all += theirs;
        } else {
            int64_t left = of->size - i;
            lanes log_p = logarithms(target_type, of->target, row, i, left, of->scale, log_sum_p),
                  log_q = logarithms(draft_type, of->draft, row, i, left, of->scale, log_sum_q);
            pull = where_less(tiny, log_q, theirs);
            sums += theirs * (larger(log_p, tiny) - larger(log_q, tiny));
        }
        kept += pull;
        store(pull, p + i);
    }
    float sum = total(kept), sign = of->kind == OVERLAP ? of->scale : -of->scale;
    for (int64_t i = 0; i < of->size; i += LANES)
        store_values(draft_type, (load(p + i) - load(q + i) * (of_q * sum)) * sign, of->slopes,
                     (size_t)(row * of->size + i), of->size - i);
    float value = of->kind == OVERLAP ? total(sums) / total(all) : total(sums);
    /* Rounding can reach below 0; what is not a number stays none. */
    value += 0 * log_sum_q;
    of->values[row] = value < 0 ? 0 : value;
}

INLINE void pair_of_row_back(int type, const Pair *of, int64_t row) {
    for (int64_t i = 0; i < of->size; i += LANES) {
        size_t at = (size_t)(row * of->size + i);
        lanes slope = load_values(type, of->slopes, at, of->size - i, 0);
        store_values(type, slope * of->value_grads[row], of->draft_grad, at, of->size - i);
    }
}

/* Vectors are no shorter than the root of this, so that one of nothing but zeros has a direction. */
static const float MIN_SQUARE = 1e-6f;

INLINE void direction_of_row(int target_type, int draft_type, const Pair *of, int64_t row) {
    size_t here = (size_t)(row * of->draft.row), there = (size_t)(row * of->target.row);
    lanes ours = {0}, theirs = {0}, both = {0};
    for (int64_t i = 0; i < of->size; i += LANES) {
        lanes x = load_values(draft_type, of->draft.logits, here + (size_t)i, of->size - i, 0),
              y = load_values(target_type, of->target.logits, there + (size_t)i, of->size - i, 0);
        ours += x * x, theirs += y * y, both += x * y;
    }
    float square = fmaxf(total(ours), MIN_SQUARE),
          scale = 1 / sqrtf(square * fmaxf(total(theirs), MIN_SQUARE)), cosine = total(both) * scale;
    for (int64_t i = 0; i < of->size; i += LANES) {
        lanes x = load_values(draft_type, of->draft.logits, here + (size_t)i, of->size - i, 0),
              y = load_values(target_type, of->target.logits, there + (size_t)i, of->size - i, 0);
        store_values(draft_type, x * (cosine / square) - y * scale, of->slopes, (size_t)(row * of->size + i),
                     of->size - i);
    }
    of->values[row] = 1 - cosine;
}

/* OVERLAP: sum of min(p, q) / sum of p, so that it is 1 at p = q whatever is rounded; the gradient of the
   draft's logits is value_grad * scale * q * ([q < p] - sum of q where q < p).
   FORWARD_KL: sum of p (log p - log q); the gradient is value_grad * scale * (q - p).
   DIRECTION: 1 - cosine, of states x and y; the gradient is value_grad * (cosine x / |x|^2 - y / |x| |y|).
   What of it does not depend on value_grad is made with the value. */
int nestling_pair(const Pair *of, int backward, int num_threads) {
    size_t line = padded((size_t)of->size);
    float *memory = aligned_alloc(64, 8 * line * (size_t)num_threads);
    if (memory == NULL) return 1;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < of->rows; row++) {
        float *p = memory + 2 * line * (size_t)omp_get_thread_num();
        if (backward)
            pair_of_row_back(of->draft.type, of, row);
        else if (of->kind == DIRECTION)
            direction_of_row(of->target.type, of->draft.type, of, row);
        else if (of->target.type == BF16 && of->draft.type == BF16)
            pair_of_row(BF16, BF16, of, row, p, p + line);
        else if (of->target.type == FP32 && of->draft.type == FP32)
            pair_of_row(FP32, FP32, of, row, p, p + line);
        else
            pair_of_row(of->target.type, of->draft.type, of, row, p, p + line);
    }
    free(memory);
    return 0;
}
