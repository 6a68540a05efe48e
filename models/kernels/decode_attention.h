/* Attention of a pass of models/kernels/decode_step.c. */

#pragma once

#include "pass.h"

/* Queries that read a value at once, as many as the registers hold, and queries that read a key at once. */
enum { QUERIES = BLOCK_ROWS, MAX_QUERIES = 24 };

/* Keys of a panel of positions from `first` on, each a "neuron" whose output is its score; those from
   `count` on are not read. */
INLINE void key_panel(const uint32_t *keys, int first, int count, int entries, words *panel) {
    uint32_t *to = (uint32_t *)panel;
    const uint32_t *of[PANEL];
    for (int output = 0; output < PANEL; output++)
        of[output] = keys + (size_t)(first + output < count ? first + output : count - 1) * entries;
    int done = 0;
    for (; done + LANES <= entries; done += LANES)
        for (int h = 0; h < VECTORS; h++)
            transpose_square(of + h * LANES, (size_t)done, to + done * PANEL + h * LANES, PANEL);
    for (int i = done; i < entries; i++)
        for (int output = 0; output < PANEL; output++) to[i * PANEL + output] = of[output][i];
}

/* mixed [queries][size] += scores [queries][count] . values [count][size], for some of the 16s of `size`. */
INLINE void mix(int type, int queries, int parts, const float *scores, size_t stride, const void *values,
                size_t at, int count, int size, float *mixed) {
    lanes sums[QUERIES][BLOCK_VECTORS];
    for (int q = 0; q < queries; q++)
        for (int p = 0; p < parts; p++) sums[q][p] = (lanes){0};
    for (int s = 0; s < count; s++)
        for (int p = 0; p < parts; p++) {
            lanes value = load_values(type, values, at + (size_t)s * size + p * LANES, LANES, 0);
            for (int q = 0; q < queries; q++)
                sums[q][p] = fused(value, spread(scores[q * stride + s]), sums[q][p]);
        }
    for (int q = 0; q < queries; q++)
        for (int p = 0; p < parts; p++) store(sums[q][p], mixed + (size_t)q * size + p * LANES);
}

INLINE void mix_all(int type, int queries, const float *scores, size_t stride, const void *values, size_t at,
                    int count, int size, float *mixed) {
    int i = 0;
    for (; i + BLOCK_VECTORS * LANES <= size; i += BLOCK_VECTORS * LANES)
        mix(type, queries, BLOCK_VECTORS, scores, stride, values, at + i, count, size, mixed + i);
    for (; i + LANES <= size; i += LANES)
        if (LANES == 16)
            mix(type, queries, 1, scores, stride, values, at + i, count, size, mixed + i);
        else /* sizes that are no multiple of 16 are rare, and copies of this code take time to compile */
            for (int q = 0; q < queries; q++)
                mix(type, 1, 1, scores + q * stride, stride, values, at + i, count, size,
                    mixed + q * size + i);
    for (; i < size; i++)
        for (int q = 0; q < queries; q++) {
            float sum = 0;
            for (int s = 0; s < count; s++)
                sum += scores[q * stride + s] * cached(type, values, at + (size_t)s * size + i);
            mixed[(size_t)q * size + i] = sum;
        }
}

/* The same for any number of queries, as many at once as the registers hold, or nearly. */
INLINE void mix_blocks(int type, int queries, const float *scores, size_t stride, const void *values,
                       size_t at, int count, int size, float *mixed) {
    int blocks = ceil_div(queries, QUERIES);
#define QUERIES_OF(number)                                                                                   \
    case number:                                                                                             \
        mix_all(type, number, scores + from * stride, stride, values, at, count, size, to);                  \
        break;
    for (int block = 0; block < blocks; block++) {
        int from = queries * block / blocks;
        float *to = mixed + (size_t)from * size;
        switch (queries * (block + 1) / blocks - from) {
            // clang-format off
            QUERIES_OF(1) QUERIES_OF(2) QUERIES_OF(3) QUERIES_OF(4) QUERIES_OF(5) QUERIES_OF(6)
#ifdef __AVX512F__
            QUERIES_OF(7) QUERIES_OF(8) QUERIES_OF(9) QUERIES_OF(10) QUERIES_OF(11) QUERIES_OF(12)
#endif
            // clang-format on
        }
    }
#undef QUERIES_OF
}

/* scores [count] to their exponentials, of which those from `seen` on are 0; returns their sum. */
INLINE float exponentials(float *scores, int seen, int count, float scale) {
    int whole_end = ceil_div(seen, LANES) * LANES;
    float most = largest(scores, seen);
    lanes sums = {0};
    for (int s = seen; s < whole_end; s++) scores[s] = -INFINITY;
    for (int s = 0; s < seen; s += LANES) {
        lanes some = exponential((load(scores + s) - most) * scale);
        store(some, scores + s);
        sums += some;
    }
    for (int s = whole_end; s < count; s++) scores[s] = 0;
    return total(sums);
}

/* Softmax attention of the queries of one request's rows and one group, from number `mine.first` on: query q
   is that of row q / heads_per_group. They read a key or value at once, and each has sums of its own. */
INLINE void attend_as(int type, const Pass *pass, const Thread *thread, const Layer *layer, int first_row,
                      int group, Range mine) {
    const Model *model = pass->model;
    const Request *request = pass->rows[first_row].request;
    int size = model->head_dim, each = model->heads_per_group, n = depth(type, size);
    float scale = 1.0f / sqrtf((float)size), *mixed = thread->y;
    size_t at = cached_at(model, request, group, 0), stride = thread->num_scores;
    const char *keys = request->keys[layer->index];
    const uint32_t *group_keys = (const uint32_t *)(keys + at * (type == BF16 ? 2 : 4));
    int total = mine.last - mine.first, blocks = ceil_div(total, MAX_QUERIES);
    for (int block = 0; block < blocks; block++) {
        int first = mine.first + total * block / blocks;
        int queries = mine.first + total * (block + 1) / blocks - first;
        int count = pass->rows[first_row + (first + queries - 1) / each].position + 1;
        Input query_input = of_rows(thread->query_input, queries);
        for (int q = 0; q < queries; q++) {
            int row = first_row + (first + q) / each, head = group * each + (first + q) % each;
            const float *query = pass->queries + (size_t)row * model->query_width + (size_t)head * size;
            place(type, query, 0, size, query_input, q);
        }
        for (int s = 0; s < count; s += PANEL) {
            key_panel(group_keys, s, count, n, thread->panel);
            Map map = {.panels = thread->panel, .entries = n, .type = type};
            product(map, 0, n, query_input, thread->scores + s, stride);
        }
        float sums[MAX_QUERIES];
        for (int q = 0; q < queries; q++) {
            int seen = pass->rows[first_row + (first + q) / each].position + 1;
            sums[q] = exponentials(thread->scores + q * stride, seen, count, scale);
        }
        mix_blocks(type, queries, thread->scores, stride, request->values[layer->index], at, count, size,
                   mixed);
        for (int q = 0; q < queries; q++) {
            int row = first_row + (first + q) / each, head = group * each + (first + q) % each;
            float inverse = 1.0f / sums[q];
            for (int i = 0; i < size; i++) mixed[(size_t)q * size + i] *= inverse;
            place(shared_type(input_type(model)), mixed + (size_t)q * size, head * size, size, pass->mixed,
                  row);
        }
    }
}

static void attend(const Pass *pass, const Thread *thread, const Layer *layer) {
    const Model *model = pass->model;
    for (int first = 0, end; first < pass->num_rows; first = end) {
        for (end = first + 1; end < pass->num_rows && pass->rows[end].request == pass->rows[first].request;)
            end++;
        /* Every thread takes as many queries, some groups' and a part of another's. */
        int queries = (end - first) * model->heads_per_group;
        Range mine = range_of(thread, layer->groups * queries);
        for (int from = mine.first, to; from < mine.last; from = to) {
            int group = from / queries, before = group * queries;
            to = before + queries < mine.last ? before + queries : mine.last;
            Range part = {from - before, to - before};
            if (model->cache == BF16)
                attend_as(BF16, pass, thread, layer, first, group, part);
            else
                attend_as(FP32, pass, thread, layer, first, group, part);
        }
    }
}
