/* What models/kernels/decode_step.c runs: a model and requests, as models/packed/decode_step.py passes them,
   and a pass over some of their tokens, with what its threads have. */

#pragma once

#include "matmul.h"
#include "sample.h"

/* ---------------------------------------------------------------- what models/packed/decode_step.py passes
 */

typedef struct {
    Map query, key, value, output, gate, up, down;
    const float *attention_norm, *ffn_norm, *query_norm, *key_norm; /* the last two, or NULL */
    int32_t index, groups, ffn, rotates; /* of the member; whether queries and keys have positions */
} Layer;

typedef struct {
    int32_t cache, embedding;                                    /* FP32 or BF16; an embedding in blocks */
    int32_t hidden, head_dim, heads_per_group, query_width, ffn; /* of the full model */
    int32_t num_layers, num_outputs; /* no outputs: the answer is the residual streams, [rows][hidden] */
    float epsilon;
    const void *embeddings;
    const int64_t *outputs;              /* ids of the tokens that the head scores, or NULL: all */
    const float *cosines, *sines, *norm; /* sines with the sign of the rotation */
    Map head;
    const Layer *layers;
} Model;

/* Of the products of all layers, whose weights are of one type or all in blocks; the head's may be another. */
INLINE int input_type(const Model *model) { return inputs_for((int)model->layers[0].query.type); }

INLINE int head_type(const Model *model) { return inputs_for((int)model->head.type); }

typedef struct {
    void *const *keys, *const *values; /* of each layer: [groups][positions][head_dim] */
    int64_t positions;
    int32_t length, count, scored; /* committed positions, new tokens, those of them scored, the last ones */
    int32_t num_draws;             /* tokens to choose, each of which but the last is read, too */
    Sampling sampling;             /* how they are chosen */
    int64_t *chosen;               /* and are put here */
} Request;

/* ---------------------------------------------------------------- one pass */

/* More rows than this run one block after another: their inputs should stay in the nearest cache. */
enum { MAX_ROWS = 48 };

typedef struct {
    const Request *request;
    int64_t token;
    int32_t position, output; /* output: the row of the logits, or -1 */
} Row;

typedef struct {
    const Model *model;
    const Row *rows;
    int num_rows, num_scored;
    float *x, *queries, *logits; /* [rows][hidden], [rows][query_width], [all scored][num_outputs] */
    Input input;                 /* of a product that follows a norm, or of any where rows are scaled */
    Input mixed, hidden; /* inputs of `output` and `down`, or rows of fp32 that become one and are scaled */
} Pass;

typedef struct {
    int number, count; /* of this thread, and of all */
    Input input;       /* the same that this thread makes alone */
    Input head_input;  /* that of the head, in the same place */
    float *line;       /* one row of such an input, or of queries and keys */
    float *y, *z;      /* results of one or two products: [rows][a panel, or those of a head] */
    Input query_input; /* queries, as a product reads them */
    words *panel;      /* of keys */
    float *scores;     /* of such queries, each with num_scores positions */
    size_t num_scores;
} Thread;

typedef struct {
    int first, last;
} Range;

INLINE Range range_of(const Thread *thread, int count) {
    return (Range){(int)((int64_t)count * thread->number / thread->count),
                   (int)((int64_t)count * (thread->number + 1) / thread->count)};
}

INLINE size_t cached_at(const Model *model, const Request *request, int group, int position) {
    return ((size_t)group * request->positions + position) * model->head_dim;
}

INLINE float cached(int type, const void *store, size_t at) {
    return type == BF16 ? from_bf16(((const uint16_t *)store)[at]) : ((const float *)store)[at];
}

/* Of an input whose parts several threads make: a row that is scaled is so as a whole, and later. */
INLINE int shared_type(int type) { return is_scaled(type) ? FP32 : type; }
