/* Layers of a pass of models/kernels/decode_step.c, which every thread of a team goes through. */

#pragma once

#include "decode_attention.h"

/* Each thread makes some rows of a product's input. A single row each makes for itself, which takes less time
   than waiting for each other. */
INLINE Input begin_input(const Pass *pass, const Thread *thread, Range *mine) {
    int alone = pass->num_rows == 1;
    *mine = alone ? (Range){0, pass->num_rows} : range_of(thread, pass->num_rows);
    return alone ? thread->input : pass->input;
}

INLINE void end_input(const Pass *pass) {
    if (pass->num_rows == 1) return;
#pragma omp barrier
}

/* The input of what follows a norm. */
static Input norm_rows(const Pass *pass, const Thread *thread, const float *weight) {
    const Model *model = pass->model;
    Range mine;
    Input input = begin_input(pass, thread, &mine);
    for (int r = mine.first; r < mine.last; r++) {
        normalise(pass->x + (size_t)r * model->hidden, weight, model->hidden, model->epsilon, thread->line);
        place_row(input_type(model), thread->line, model->hidden, input, r);
    }
    end_input(pass);
    return input;
}

/* The input whose parts the threads have made. */
INLINE Input scaled(const Pass *pass, const Thread *thread, Input parts, int count) {
    int type = input_type(pass->model);
    if (!is_scaled(type)) return parts;
    Range mine;
    Input input = begin_input(pass, thread, &mine);
    for (int r = mine.first; r < mine.last; r++)
        place_row(type, (const float *)entries_of(FP32, parts, r), count, input, r);
    end_input(pass);
    return input;
}

/* Queries to pass->queries, keys and values to the caches, a head at a time; those of a group one after
   another, as the thread that makes them is then the one that reads them. */
static void project(const Pass *pass, const Thread *thread, const Layer *layer, Input input) {
    const Model *model = pass->model;
    int size = model->head_dim, panels = ceil_div(size, PANEL), queries = model->heads_per_group;
    int n = depth(input_type(model), model->hidden), m = pass->num_rows, stride = panels * PANEL;
    Range mine = range_of(thread, layer->groups * (queries + 2));
    for (int unit = mine.first; unit < mine.last; unit++) {
        int group = unit / (queries + 2), within = unit % (queries + 2);
        int is_query = within < queries, is_key = within == queries;
        int head = is_query ? group * queries + within : group;
        Map map = is_query ? layer->query : is_key ? layer->key : layer->value;
        const float *norm = is_query ? layer->query_norm : is_key ? layer->key_norm : NULL;
        for (int p = 0; p < panels; p++)
            product(map, head * panels + p, n, input, thread->y + p * PANEL, stride);
        for (int r = 0; r < m; r++) {
            const Row *row = pass->rows + r;
            float *y = thread->y + (size_t)r * stride;
            if (map.bias)
                for (int i = 0; i < size; i++) y[i] += map.bias[head * size + i];
            if (norm) normalise(y, norm, size, model->epsilon, y);
            if ((is_query || is_key) && layer->rotates) {
                size_t angles = (size_t)row->position * size;
                memcpy(thread->line, y, 4 * (size_t)size);
                rotate(thread->line, model->cosines + angles, model->sines + angles, size / 2, y);
            }
            if (is_query) {
                memcpy(pass->queries + (size_t)r * model->query_width + head * size, y, 4 * (size_t)size);
            } else {
                void *const *stores = is_key ? row->request->keys : row->request->values;
                store_row(model->cache, y, 1, size, stores[layer->index],
                          cached_at(model, row->request, head, row->position));
            }
        }
    }
}

/* x += map(input), of which the first `inputs` values are used. */
static void add(const Pass *pass, const Thread *thread, Map map, int inputs, Input made) {
    const Model *model = pass->model;
    Input input = scaled(pass, thread, made, inputs);
    int type = input_type(model), m = pass->num_rows, stride = PANEL;
    Range mine = range_of(thread, ceil_div(model->hidden, PANEL));
    for (int p = mine.first; p < mine.last; p++) {
        int first = p * PANEL;
        int count = first + PANEL < model->hidden ? PANEL : model->hidden - first;
        product(map, p, depth(type, inputs), input, thread->y, stride);
        for (int r = 0; r < m; r++) {
            float *x = pass->x + (size_t)r * model->hidden + first, *y = thread->y + (size_t)r * stride;
#pragma omp simd
            for (int i = 0; i < count; i++) x[i] += y[i];
        }
    }
}

/* pass->hidden = silu(gate(input)) * up(input); neurons up to the end of the last panel that are none are 0.
 */
static void activate(const Pass *pass, const Thread *thread, const Layer *layer, Input input) {
    const Model *model = pass->model;
    int type = input_type(model), m = pass->num_rows, stride = PANEL, n = depth(type, model->hidden);
    Range mine = range_of(thread, ceil_div(layer->ffn, PANEL));
    for (int p = mine.first; p < mine.last; p++) {
        int first = p * PANEL;
        product(layer->gate, p, n, input, thread->y, stride);
        product(layer->up, p, n, input, thread->z, stride);
        for (int r = 0; r < m; r++) {
            float *gate = thread->y + (size_t)r * stride, *up = thread->z + (size_t)r * stride;
            for (int i = 0; i < PANEL; i += LANES) {
                lanes x = load(gate + i);
                store(x * sigmoid(x) * load(up + i), gate + i);
            }
            for (int i = layer->ffn - first; i < PANEL; i++) gate[i] = 0;
            place(shared_type(type), gate, first, PANEL, pass->hidden, r);
        }
    }
}

/* Logits of the rows that are scored. */
static void score(const Pass *pass, const Thread *thread) {
    const Model *model = pass->model;
    int type = head_type(model), n = depth(type, model->hidden), m = pass->num_scored;
    int stride = PANEL;
    const Row *scored[MAX_ROWS];
    Input input = of_rows(thread->head_input, m);
    for (int r = 0, count = 0; r < pass->num_rows; r++) {
        if (pass->rows[r].output < 0) continue;
        normalise(pass->x + (size_t)r * model->hidden, model->norm, model->hidden, model->epsilon,
                  thread->line);
        place_row(type, thread->line, model->hidden, input, count);
        scored[count++] = pass->rows + r;
    }
    Range mine = range_of(thread, ceil_div(model->num_outputs, PANEL));
    for (int p = mine.first; p < mine.last; p++) {
        int first = p * PANEL;
        int count = first + PANEL < model->num_outputs ? PANEL : model->num_outputs - first;
        product(model->head, p, n, input, thread->y, stride);
        for (int r = 0; r < m; r++)
            memcpy(pass->logits + (size_t)scored[r]->output * model->num_outputs + first,
                   thread->y + (size_t)r * stride, 4 * (size_t)count);
    }
}

static void embed(const Pass *pass) {
    const Model *model = pass->model;
    int hidden = model->hidden, type = model->embedding;
    for (int r = 0; r < pass->num_rows; r++) {
        size_t row = (size_t)pass->rows[r].token;
        if (is_blocks(type))
            read_blocks(type, model->embeddings, row, hidden, pass->x + (size_t)r * hidden);
        else
            load_row(type, model->embeddings, row * hidden, hidden, 1, pass->x + (size_t)r * hidden);
    }
}

/* The residual streams of the rows that are asked for, where other layers or the head follow elsewhere. */
static void give_states(const Pass *pass, const Thread *thread) {
    size_t hidden = (size_t)pass->model->hidden;
    Range mine = range_of(thread, pass->num_rows);
    for (int r = mine.first; r < mine.last; r++)
        if (pass->rows[r].output >= 0)
            memcpy(pass->logits + (size_t)pass->rows[r].output * hidden, pass->x + (size_t)r * hidden, 4 * hidden);
}

/* What each thread of a team runs. */
static void run(const Pass *pass, const Thread *thread) {
    const Model *model = pass->model;
    begin_tiles(thread->input.tile_rows);
    for (int index = 0; index < model->num_layers; index++) {
        const Layer *layer = model->layers + index;
        int width = layer->groups * model->heads_per_group * model->head_dim;
        project(pass, thread, layer, norm_rows(pass, thread, layer->attention_norm));
#pragma omp barrier
        attend(pass, thread, layer);
#pragma omp barrier
        add(pass, thread, layer->output, width, pass->mixed);
#pragma omp barrier
        activate(pass, thread, layer, norm_rows(pass, thread, layer->ffn_norm));
#pragma omp barrier
        add(pass, thread, layer->down, layer->ffn, pass->hidden);
#pragma omp barrier
    }
    if (!model->num_outputs)
        give_states(pass, thread);
    else if (pass->num_scored)
        score(pass, thread);
    end_tiles();
}
