/* Attention of models/kernels/train_ops.c: softmax(q k' / sqrt(size) + bias) v, and its gradients, in fp32.

   A thread lays out the keys and values of a row and group of its own, and all of the group's queries pass
   by, a block of them at a time: their scores are made, used and forgotten. The backward pass makes them
   again from the logarithm of each query's sum (FlashAttention-2, https://arxiv.org/abs/2307.08691,
   section 3.1). Sums are taken in one order, whatever the number of threads. */

#pragma once

#include <omp.h>
#include <stdlib.h>

#include "vector_math.h"

/* Strides in values between rows, heads and positions; the values of one vector lie side by side. */
typedef struct {
    void *values;
    int64_t row, head, position;
} Heads;

typedef struct {
    int32_t type, rows, groups, heads_per_group, num_queries, num_keys, num_recorded, size;
    const float *bias; /* of query 0 and each key, in whole panels: 0, or minus infinity for those not read */
    int64_t bias_step; /* from one query to the next */
    Heads queries, keys, values, mixed;
    Heads recorded_keys, recorded_values; /* the first keys and values, which get no gradients */
    float *log_sums;                                        /* [rows][heads][queries] */
    Heads mixed_grad, queries_grad, keys_grad, values_grad; /* of the backward pass alone */
} Attention;

/* Queries of a block: of fewer, the keys' gradients are read and written too often; of more, too many of the
   products are with keys that are not read. */
enum { PASSING = 32 };

/* Panels of keys side by side. */
typedef struct {
    int first, last;
} Run;

typedef struct {
    int width, keys;                            /* of a head in whole vectors; keys in whole panels */
    float *key, *value, *key_grad, *value_grad; /* [keys][width] */
    float *transposed_key, *transposed_value;   /* [width][keys] */
    float *query, *grad, *transposed_query, *transposed_grad; /* [PASSING][width], [width][PASSING] */
    float *scores, *scores_grad;                              /* [PASSING][keys] */
    float *made;                                              /* [PASSING][width] */
    Run *runs;
    int num_runs;
} Workspace;

/* c [rows][vectors] = a b, or += : rows and columns of a are so far apart, and rows of b and of c. */
INLINE void small_product(int rows, int vectors, int depth, const float *a, size_t row, size_t column,
                          const float *b, size_t b_row, float *c, size_t c_row, int more) {
    lanes sums[BLOCK_ROWS][BLOCK_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < vectors; h++) sums[r][h] = more ? load(c + r * c_row + h * LANES) : (lanes){0};
    for (int k = 0; k < depth; k++)
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < vectors; h++)
                sums[r][h] =
                    fused(load(b + k * b_row + h * LANES), spread(a[r * row + k * column]), sums[r][h]);
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < vectors; h++) store(sums[r][h], c + r * c_row + h * LANES);
}

/* The same for any number of rows, and of columns in whole vectors. */
static void multiply(int rows, int columns, int depth, const float *a, size_t row, size_t column,
                     const float *b, size_t b_row, float *c, size_t c_row, int more) {
#define SMALL(number)                                                                                        \
    case number:                                                                                             \
        if (vectors == BLOCK_VECTORS)                                                                        \
            small_product(number, BLOCK_VECTORS, depth, left, row, column, b + n, b_row, to, c_row, more);   \
        else                                                                                                 \
            small_product(number, 1, depth, left, row, column, b + n, b_row, to, c_row, more);               \
        break;
    int blocks = ceil_div(rows, BLOCK_ROWS);
    for (int n = 0, vectors; n < columns; n += vectors * LANES) {
        vectors = columns - n >= BLOCK_VECTORS * LANES ? BLOCK_VECTORS : 1;
        for (int block = 0; block < blocks; block++) {
            int first = rows * block / blocks;
            const float *left = a + (size_t)first * row;
            float *to = c + (size_t)first * c_row + n;
            switch (rows * (block + 1) / blocks - first) {
                // clang-format off
                SMALL(1) SMALL(2) SMALL(3) SMALL(4) SMALL(5) SMALL(6)
#ifdef __AVX512F__
                SMALL(7) SMALL(8) SMALL(9) SMALL(10) SMALL(11) SMALL(12)
#endif
                // clang-format on
            }
        }
    }
#undef SMALL
}

INLINE size_t at_head(Heads heads, int row, int head, int position) {
    return (size_t)(row * heads.row + head * heads.head + position * heads.position);
}

/* to [count][width] of positions from `first` on, times a factor, and 0 behind their end. */
static void lay_out(const Attention *of, Heads heads, int row, int head, int first, int count, int width,
                    float factor, float *to) {
    for (int i = 0; i < count; i++, to += width) {
        load_row(of->type, heads.values, at_head(heads, row, head, first + i), of->size, factor, to);
        for (int k = of->size; k < width; k++) to[k] = 0;
    }
}

/* The same of a group's keys or values, recorded ones first, and 0 behind the last up to a whole panel. */
INLINE void lay_out_keys(const Attention *of, const Workspace *space, Heads recorded, Heads heads, int row,
                         int group, float *to) {
    size_t end = (size_t)of->num_keys * space->width, whole_end = (size_t)space->keys * space->width;
    int num_recorded = of->num_recorded, width = space->width;
    lay_out(of, recorded, row, group, 0, num_recorded, width, 1, to);
    lay_out(of, heads, row, group, 0, of->num_keys - num_recorded, width, 1, to + num_recorded * width);
    memset(to + end, 0, 4 * (whole_end - end));
}

/* The other way round. */
INLINE void store_heads(const Attention *of, const float *from, Heads heads, int row, int head, int first,
                        int count, int width, float factor) {
    for (int i = 0; i < count; i++)
        store_row(of->type, from + (size_t)i * width, factor, of->size, heads.values,
                  at_head(heads, row, head, first + i));
}

/* to [width][step] = from [count][width], of whole vectors. */
static void transpose(const float *from, int count, int width, float *to, int step) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const uint32_t *rows[LANES];
        for (int j = 0; j < LANES; j++) rows[j] = (const uint32_t *)from + (size_t)(i + j) * width;
        for (int k = 0; k < width; k += LANES)
            transpose_square(rows, (size_t)k, (uint32_t *)to + (size_t)k * step + i, (size_t)step);
    }
    for (; i < count; i++)
        for (int k = 0; k < width; k++) to[(size_t)k * step + i] = from[(size_t)i * width + k];
}

INLINE const float *bias_of(const Attention *of, int query) { return of->bias + query * of->bias_step; }

/* The keys that some of the queries read. */
static void find_runs(const Attention *of, Workspace *space, int first, int count) {
    space->num_runs = 0;
    for (int s = 0, going = 0; s < space->keys; s += PANEL) {
        int read = 0;
        for (int q = first; q < first + count && !read; q++)
            for (int i = 0; i < PANEL; i++) read |= bias_of(of, q)[s + i] == 0;
        if (read && !going) space->runs[space->num_runs++].first = s;
        if (read) space->runs[space->num_runs - 1].last = s + PANEL;
        going = read;
    }
}

/* Of a block of queries and each key that some of them read: scores [count][keys]. */
INLINE void score_keys(const Workspace *space, int count, const float *transposed_left,
                       const float *transposed_right, float *scores) {
    for (const Run *run = space->runs; run < space->runs + space->num_runs; run++)
        multiply(count, run->last - run->first, space->width, transposed_left, 1, PASSING,
                 transposed_right + run->first, (size_t)space->keys, scores + run->first, (size_t)space->keys,
                 0);
}

/* [count][width]: each query's sum of what the keys have, by their weights. */
INLINE void sum_keys(const Workspace *space, int count, const float *weights, const float *of_keys,
                     float *sums) {
    for (const Run *run = space->runs; run < space->runs + space->num_runs; run++)
        multiply(count, space->width, run->last - run->first, weights + run->first, (size_t)space->keys, 1,
                 of_keys + (size_t)run->first * space->width, (size_t)space->width, sums,
                 (size_t)space->width, run > space->runs);
}

/* [keys][width] += each key's sum of what the queries have, by their weights; not where all are recorded. */
INLINE void sum_queries(const Attention *of, const Workspace *space, int count, const float *weights,
                        const float *of_queries, float *sums) {
    for (const Run *run = space->runs; run < space->runs + space->num_runs; run++)
        if (run->last > of->num_recorded)
            multiply(run->last - run->first, space->width, count, weights + run->first, 1,
                     (size_t)space->keys, of_queries, (size_t)space->width,
                     sums + (size_t)run->first * space->width, (size_t)space->width, 1);
}

/* scores [keys] = e^(scores + bias - shift); gives their sum. */
INLINE float exponentials_of(const Workspace *space, const float *bias, float shift, float *scores) {
    lanes sums = {0};
    for (const Run *run = space->runs; run < space->runs + space->num_runs; run++)
        for (int s = run->first; s < run->last; s += LANES) {
            lanes some = exponential(load(scores + s) + load(bias + s) - shift);
            store(some, scores + s);
            sums += some;
        }
    return total(sums);
}

static void attend_to(const Attention *of, Workspace *space, int row, int group) {
    float scale = 1.0f / sqrtf((float)of->size);
    int heads = of->groups * of->heads_per_group, width = space->width;
    lay_out_keys(of, space, of->recorded_keys, of->keys, row, group, space->key);
    lay_out_keys(of, space, of->recorded_values, of->values, row, group, space->value);
    transpose(space->key, space->keys, width, space->transposed_key, space->keys);
    for (int first = 0; first < of->num_queries; first += PASSING) {
        int count = of->num_queries - first < PASSING ? of->num_queries - first : PASSING;
        find_runs(of, space, first, count);
        for (int head = group * of->heads_per_group; head < (group + 1) * of->heads_per_group; head++) {
            float *log_sums = of->log_sums + ((size_t)row * heads + head) * of->num_queries + first;
            float inverse[PASSING];
            lay_out(of, of->queries, row, head, first, count, width, scale, space->query);
            transpose(space->query, count, width, space->transposed_query, PASSING);
            score_keys(space, count, space->transposed_query, space->transposed_key, space->scores);
            for (int q = 0; q < count; q++) {
                const float *bias = bias_of(of, first + q);
                float *scores = space->scores + (size_t)q * space->keys;
                lanes highest = spread(-INFINITY);
                for (const Run *run = space->runs; run < space->runs + space->num_runs; run++)
                    for (int s = run->first; s < run->last; s += LANES)
                        highest = larger(highest, load(scores + s) + load(bias + s));
                float most = largest_lane(highest);
                float sum = exponentials_of(space, bias, most, scores);
                inverse[q] = 1.0f / sum;
                log_sums[q] = most + logf(sum);
            }
            sum_keys(space, count, space->scores, space->value, space->made);
            for (int q = 0; q < count; q++)
                store_heads(of, space->made + q * width, of->mixed, row, head, first + q, 1, width,
                            inverse[q]);
        }
    }
}

static void attend_back(const Attention *of, Workspace *space, int row, int group) {
    float scale = 1.0f / sqrtf((float)of->size);
    int heads = of->groups * of->heads_per_group, width = space->width;
    size_t each = (size_t)space->keys * width;
    lay_out_keys(of, space, of->recorded_keys, of->keys, row, group, space->key);
    lay_out_keys(of, space, of->recorded_values, of->values, row, group, space->value);
    transpose(space->key, space->keys, width, space->transposed_key, space->keys);
    transpose(space->value, space->keys, width, space->transposed_value, space->keys);
    memset(space->key_grad, 0, 4 * each);
    memset(space->value_grad, 0, 4 * each);
    for (int first = 0; first < of->num_queries; first += PASSING) {
        int count = of->num_queries - first < PASSING ? of->num_queries - first : PASSING;
        find_runs(of, space, first, count);
        for (int head = group * of->heads_per_group; head < (group + 1) * of->heads_per_group; head++) {
            const float *log_sums = of->log_sums + ((size_t)row * heads + head) * of->num_queries + first;
            lay_out(of, of->queries, row, head, first, count, width, scale, space->query);
            lay_out(of, of->mixed_grad, row, head, first, count, width, 1, space->grad);
            lay_out(of, of->mixed, row, head, first, count, width, 1, space->made);
            transpose(space->query, count, width, space->transposed_query, PASSING);
            transpose(space->grad, count, width, space->transposed_grad, PASSING);
            score_keys(space, count, space->transposed_query, space->transposed_key, space->scores);
            score_keys(space, count, space->transposed_grad, space->transposed_value, space->scores_grad);
            for (int q = 0; q < count; q++) {
                float *scores = space->scores + (size_t)q * space->keys, mean = 0;
                float *grads = space->scores_grad + (size_t)q * space->keys;
#pragma omp simd reduction(+ : mean)
                for (int k = 0; k < width; k++)
                    mean += space->grad[q * width + k] * space->made[q * width + k];
                exponentials_of(space, bias_of(of, first + q), log_sums[q], scores);
                for (const Run *run = space->runs; run < space->runs + space->num_runs; run++)
                    for (int s = run->first; s < run->last; s += LANES)
                        store(load(scores + s) * (load(grads + s) - mean), grads + s);
            }
            sum_queries(of, space, count, space->scores, space->grad, space->value_grad);
            sum_queries(of, space, count, space->scores_grad, space->query, space->key_grad);
            sum_keys(space, count, space->scores_grad, space->key, space->made);
            store_heads(of, space->made, of->queries_grad, row, head, first, count, width, scale);
        }
    }
    int first = of->num_recorded * width, count = of->num_keys - of->num_recorded;
    store_heads(of, space->key_grad + first, of->keys_grad, row, group, 0, count, width, 1);
    store_heads(of, space->value_grad + first, of->values_grad, row, group, 0, count, width, 1);
}

/* A space in `memory`, or, without, the size of one. */
static size_t set_up(const Attention *of, float *memory, Workspace *space) {
    int width = ceil_div(of->size, LANES) * LANES, keys = (int)padded((size_t)of->num_keys);
    *space = (Workspace){.width = width, .keys = keys};
    size_t at = 0, by_key = (size_t)keys * width, by_query = PASSING * (size_t)width;
    struct {
        float **part;
        size_t size;
    } parts[] = {
        {&space->key, by_key},
        {&space->value, by_key},
        {&space->key_grad, by_key},
        {&space->value_grad, by_key},
        {&space->transposed_key, by_key},
        {&space->transposed_value, by_key},
        {&space->query, by_query},
        {&space->grad, by_query},
        {&space->made, by_query},
        {&space->transposed_query, by_query},
        {&space->transposed_grad, by_query},
        {&space->scores, PASSING * (size_t)keys},
        {&space->scores_grad, PASSING * (size_t)keys},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].part = memory + at;
        at += padded(parts[i].size);
    }
    space->runs = (Run *)(memory + at);
    return at + padded((size_t)keys / PANEL * sizeof(Run) / 4);
}

/* `mixed` and `log_sums`, or with `backward` the gradients. Returns 0, or 1 if there is no memory. */
int nestling_attention(const Attention *of, int backward, int num_threads) {
    Workspace none;
    size_t each = set_up(of, NULL, &none);
    float *memory = aligned_alloc(64, 4 * each * (size_t)num_threads);
    if (memory == NULL) return 1;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int unit = 0; unit < of->rows * of->groups; unit++) {
        Workspace space;
        set_up(of, memory + each * (size_t)omp_get_thread_num(), &space);
        (backward ? attend_back : attend_to)(of, &space, unit / of->groups, unit % of->groups);
    }
    free(memory);
    return 0;
}
