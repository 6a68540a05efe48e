/* Attention of models/kernels/train_ops.c: softmax(q k' / sqrt(size) + bias) v, and its gradients, in fp32.

   A thread lays out the keys and values of a row and group of its own, and all of the group's queries pass
   by, a block of them at a time: their scores are made, used and forgotten. The backward pass makes them
   again from the logarithm of each query's sum (FlashAttention-2, https://arxiv.org/abs/2307.08691,
   section 3.1). Sums are taken in one order, whatever the number of threads. */

#pragma once

#include <omp.h>
#include <stdlib.h>

#include "vector_math.h"

/* One row's positions of a head are so many values apart; the values of one lie side by side. */
typedef struct {
    void *values;
    int64_t row, head, position;
} Heads;

typedef struct {
    int32_t type, rows, groups, heads_per_group, num_queries, num_keys, size;
    const float *bias; /* of query 0 and each key, in whole panels: 0, or minus infinity for those not read */
    int64_t bias_step; /* from one query to the next */
    Heads queries, keys, values, mixed;
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
    int width, keys;                                  /* of a head in whole vectors; keys in whole panels */
    float *key, *value, *key_grad, *value_grad;       /* [keys][width] */
    float *turned_key, *turned_value;                 /* [width][keys] */
    float *query, *grad, *turned_query, *turned_grad; /* [PASSING][width], [width][PASSING] */
    float *scores, *scores_grad;                      /* [PASSING][keys] */
    float *made;                                      /* [PASSING][width] */
    Run *runs;
    int num_runs;
} Desk;

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

/* The same of a group's keys or values, and 0 behind the last of them up to a whole panel. */
INLINE void lay_out_keys(const Attention *of, const Desk *desk, Heads heads, int row, int group, float *to) {
    size_t end = (size_t)of->num_keys * desk->width, whole_end = (size_t)desk->keys * desk->width;
    lay_out(of, heads, row, group, 0, of->num_keys, desk->width, 1, to);
    memset(to + end, 0, 4 * (whole_end - end));
}

/* The other way round. */
INLINE void give_back(const Attention *of, const float *from, Heads heads, int row, int head, int first,
                      int count, int width, float factor) {
    for (int i = 0; i < count; i++)
        store_row(of->type, from + (size_t)i * width, factor, of->size, heads.values,
                  at_head(heads, row, head, first + i));
}

/* to [width][step] = from [count][width], of whole vectors. */
static void turn(const float *from, int count, int width, float *to, int step) {
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
static void find_runs(const Attention *of, Desk *desk, int first, int count) {
    desk->num_runs = 0;
    for (int s = 0, going = 0; s < desk->keys; s += PANEL) {
        int read = 0;
        for (int q = first; q < first + count && !read; q++)
            for (int i = 0; i < PANEL; i++) read |= bias_of(of, q)[s + i] == 0;
        if (read && !going) desk->runs[desk->num_runs++].first = s;
        if (read) desk->runs[desk->num_runs - 1].last = s + PANEL;
        going = read;
    }
}

/* Of a block of queries and each key that some of them read: scores [count][keys]. */
INLINE void score_keys(const Desk *desk, int count, const float *turned_left, const float *turned_right,
                       float *scores) {
    for (const Run *run = desk->runs; run < desk->runs + desk->num_runs; run++)
        multiply(count, run->last - run->first, desk->width, turned_left, 1, PASSING,
                 turned_right + run->first, (size_t)desk->keys, scores + run->first, (size_t)desk->keys, 0);
}

/* [count][width]: each query's sum of what the keys have, by their weights. */
INLINE void sum_keys(const Desk *desk, int count, const float *weights, const float *of_keys, float *sums) {
    for (const Run *run = desk->runs; run < desk->runs + desk->num_runs; run++)
        multiply(count, desk->width, run->last - run->first, weights + run->first, (size_t)desk->keys, 1,
                 of_keys + (size_t)run->first * desk->width, (size_t)desk->width, sums, (size_t)desk->width,
                 run > desk->runs);
}

/* [keys][width] += each key's sum of what the queries have, by their weights. */
INLINE void sum_queries(const Desk *desk, int count, const float *weights, const float *of_queries,
                        float *sums) {
    for (const Run *run = desk->runs; run < desk->runs + desk->num_runs; run++)
        multiply(run->last - run->first, desk->width, count, weights + run->first, 1, (size_t)desk->keys,
                 of_queries, (size_t)desk->width, sums + (size_t)run->first * desk->width,
                 (size_t)desk->width, 1);
}

/* scores [keys] = e^(scores + bias - shift); gives their sum. */
INLINE float exponentials_of(const Desk *desk, const float *bias, float shift, float *scores) {
    lanes sums = {0};
    for (const Run *run = desk->runs; run < desk->runs + desk->num_runs; run++)
        for (int s = run->first; s < run->last; s += LANES) {
            lanes some = exponential(load(scores + s) + load(bias + s) - shift);
            store(some, scores + s);
            sums += some;
        }
    return total(sums);
}

static void attend_to(const Attention *of, Desk *desk, int row, int group) {
    float scale = 1.0f / sqrtf((float)of->size);
    int heads = of->groups * of->heads_per_group, width = desk->width;
    lay_out_keys(of, desk, of->keys, row, group, desk->key);
    lay_out_keys(of, desk, of->values, row, group, desk->value);
    turn(desk->key, desk->keys, width, desk->turned_key, desk->keys);
    for (int first = 0; first < of->num_queries; first += PASSING) {
        int count = of->num_queries - first < PASSING ? of->num_queries - first : PASSING;
        find_runs(of, desk, first, count);
        for (int head = group * of->heads_per_group; head < (group + 1) * of->heads_per_group; head++) {
            float *log_sums = of->log_sums + ((size_t)row * heads + head) * of->num_queries + first;
            float inverse[PASSING];
            lay_out(of, of->queries, row, head, first, count, width, scale, desk->query);
            turn(desk->query, count, width, desk->turned_query, PASSING);
            score_keys(desk, count, desk->turned_query, desk->turned_key, desk->scores);
            for (int q = 0; q < count; q++) {
                const float *bias = bias_of(of, first + q);
                float *scores = desk->scores + (size_t)q * desk->keys;
                lanes highest = spread(-INFINITY);
                for (const Run *run = desk->runs; run < desk->runs + desk->num_runs; run++)
                    for (int s = run->first; s < run->last; s += LANES)
                        highest = larger(highest, load(scores + s) + load(bias + s));
                float most = largest_lane(highest);
                float sum = exponentials_of(desk, bias, most, scores);
                inverse[q] = 1.0f / sum;
                log_sums[q] = most + logf(sum);
            }
            sum_keys(desk, count, desk->scores, desk->value, desk->made);
            for (int q = 0; q < count; q++)
                give_back(of, desk->made + q * width, of->mixed, row, head, first + q, 1, width, inverse[q]);
        }
    }
}

static void attend_back(const Attention *of, Desk *desk, int row, int group) {
    float scale = 1.0f / sqrtf((float)of->size);
    int heads = of->groups * of->heads_per_group, width = desk->width;
    size_t each = (size_t)desk->keys * width;
    lay_out_keys(of, desk, of->keys, row, group, desk->key);
    lay_out_keys(of, desk, of->values, row, group, desk->value);
    turn(desk->key, desk->keys, width, desk->turned_key, desk->keys);
    turn(desk->value, desk->keys, width, desk->turned_value, desk->keys);
    memset(desk->key_grad, 0, 4 * each);
    memset(desk->value_grad, 0, 4 * each);
    for (int first = 0; first < of->num_queries; first += PASSING) {
        int count = of->num_queries - first < PASSING ? of->num_queries - first : PASSING;
        find_runs(of, desk, first, count);
        for (int head = group * of->heads_per_group; head < (group + 1) * of->heads_per_group; head++) {
            const float *log_sums = of->log_sums + ((size_t)row * heads + head) * of->num_queries + first;
            lay_out(of, of->queries, row, head, first, count, width, scale, desk->query);
            lay_out(of, of->mixed_grad, row, head, first, count, width, 1, desk->grad);
            lay_out(of, of->mixed, row, head, first, count, width, 1, desk->made);
            turn(desk->query, count, width, desk->turned_query, PASSING);
            turn(desk->grad, count, width, desk->turned_grad, PASSING);
            score_keys(desk, count, desk->turned_query, desk->turned_key, desk->scores);
            score_keys(desk, count, desk->turned_grad, desk->turned_value, desk->scores_grad);
            for (int q = 0; q < count; q++) {
                float *scores = desk->scores + (size_t)q * desk->keys, mean = 0;
                float *grads = desk->scores_grad + (size_t)q * desk->keys;
#pragma omp simd reduction(+ : mean)
                for (int k = 0; k < width; k++) mean += desk->grad[q * width + k] * desk->made[q * width + k];
                exponentials_of(desk, bias_of(of, first + q), log_sums[q], scores);
                for (const Run *run = desk->runs; run < desk->runs + desk->num_runs; run++)
                    for (int s = run->first; s < run->last; s += LANES)
                        store(load(scores + s) * (load(grads + s) - mean), grads + s);
            }
            sum_queries(desk, count, desk->scores, desk->grad, desk->value_grad);
            sum_queries(desk, count, desk->scores_grad, desk->query, desk->key_grad);
            sum_keys(desk, count, desk->scores_grad, desk->key, desk->made);
            give_back(of, desk->made, of->queries_grad, row, head, first, count, width, scale);
        }
    }
    give_back(of, desk->key_grad, of->keys_grad, row, group, 0, of->num_keys, width, 1);
    give_back(of, desk->value_grad, of->values_grad, row, group, 0, of->num_keys, width, 1);
}

/* A desk in `memory`, or, without, the size of one. */
static size_t set_up(const Attention *of, float *memory, Desk *desk) {
    int width = ceil_div(of->size, LANES) * LANES, keys = (int)padded((size_t)of->num_keys);
    *desk = (Desk){.width = width, .keys = keys};
    size_t at = 0, by_key = (size_t)keys * width, by_query = PASSING * (size_t)width;
    struct {
        float **part;
        size_t size;
    } parts[] = {
        {&desk->key, by_key},
        {&desk->value, by_key},
        {&desk->key_grad, by_key},
        {&desk->value_grad, by_key},
        {&desk->turned_key, by_key},
        {&desk->turned_value, by_key},
        {&desk->query, by_query},
        {&desk->grad, by_query},
        {&desk->made, by_query},
        {&desk->turned_query, by_query},
        {&desk->turned_grad, by_query},
        {&desk->scores, PASSING * (size_t)keys},
        {&desk->scores_grad, PASSING * (size_t)keys},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].part = memory + at;
        at += padded(parts[i].size);
    }
    desk->runs = (Run *)(memory + at);
    return at + padded((size_t)keys / PANEL * sizeof(Run) / 4);
}

/* `mixed` and `log_sums`, or with `backward` the gradients. Returns 0, or 1 if there is no memory. */
int nestling_attention(const Attention *of, int backward, int num_threads) {
    Desk none;
    size_t each = set_up(of, NULL, &none);
    float *memory = aligned_alloc(64, 4 * each * (size_t)num_threads);
    if (memory == NULL) return 1;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int unit = 0; unit < of->rows * of->groups; unit++) {
        Desk desk;
        set_up(of, memory + each * (size_t)omp_get_thread_num(), &desk);
        (backward ? attend_back : attend_to)(of, &desk, unit / of->groups, unit % of->groups);
    }
    free(memory);
    return 0;
}
