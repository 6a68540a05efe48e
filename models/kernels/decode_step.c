/* A pass of a nested transformer over a few tokens, as one call: models/packed/decode_step.py describes the
   model.

   What is computed is models/elastic/model.py's, in fp32 but for what is stored in fewer bits: weights, in
   bf16, 8 or 4 bits with a scale for each output; keys and values; and the inputs of products, where the
   processor multiplies pairs of bf16, and with weights of 8 or 4 bits, where they have 8 and a scale for each
   token.

       embedding -> [ x + attention(norm(x));  x + mlp(norm(x)) ] per layer -> norm -> head

   A token's result is the same bits in any pass: no other token, thread or request changes the order of its
   sums. Threads share each product's outputs, wait for each other, and go on to the next. */

#include <omp.h>
#include <stdlib.h>

#include "decode_attention.h"

/* ---------------------------------------------------------------- parts of a layer */

/* Threads make a product's input together, each some rows. A single row each makes for itself, which takes
   less time than waiting for each other. */
INLINE Input begin_input(const Pass *pass, const Thread *thread, Range *mine) {
    int alone = pass->num_rows == 1;
    *mine = alone ? (Range){0, pass->num_rows} : share(thread, pass->num_rows);
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

/* An input made of what threads made together part by part. */
INLINE Input scaled(const Pass *pass, const Thread *thread, Input parts, int count) {
    if (input_type(pass->model) != INT8) return parts;
    Range mine;
    Input input = begin_input(pass, thread, &mine);
    for (int r = mine.first; r < mine.last; r++)
        place_codes((const float *)entries_of(FP32, parts, r), count, input, r);
    end_input(pass);
    return input;
}

/* Queries to pass->queries, keys and values to the caches, a head at a time; those of a group one after
   another, as the thread that makes them is then the one that reads them. */
static void project(const Pass *pass, const Thread *thread, const Layer *layer, Input input) {
    const Model *model = pass->model;
    int size = model->head_dim, panels = ceil_div(size, PANEL), queries = model->heads_per_group;
    int n = depth(input_type(model), model->hidden), m = pass->num_rows, stride = panels * PANEL;
    Range mine = share(thread, layer->groups * (queries + 2));
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
            if (is_query || is_key) {
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
    Range mine = share(thread, ceil_div(model->hidden, PANEL));
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
    Range mine = share(thread, ceil_div(layer->ffn, PANEL));
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
    int type = input_type(model), n = depth(type, model->hidden), m = pass->num_scored, stride = PANEL;
    const Row *scored[MAX_ROWS];
    Input input = of_rows(thread->input, m);
    for (int r = 0, count = 0; r < pass->num_rows; r++) {
        if (pass->rows[r].output < 0) continue;
        normalise(pass->x + (size_t)r * model->hidden, model->norm, model->hidden, model->epsilon,
                  thread->line);
        place_row(type, thread->line, model->hidden, input, count);
        scored[count++] = pass->rows + r;
    }
    Range mine = share(thread, ceil_div(model->num_outputs, PANEL));
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
    for (int r = 0; r < pass->num_rows; r++)
        for (int i = 0; i < model->hidden; i++)
            pass->x[(size_t)r * model->hidden + i] =
                cached(model->embedding, model->embeddings, (size_t)pass->rows[r].token * model->hidden + i);
}

/* What each thread of a team runs. */
static void run(const Pass *pass, const Thread *thread) {
    const Model *model = pass->model;
    begin_tiles(thread->input.together);
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
    if (pass->num_scored) score(pass, thread);
    end_tiles();
}

/* ---------------------------------------------------------------- the door */

typedef struct {
    int ffn, widest;                                   /* values of a row of `hidden`, and of an input */
    size_t rows, x, queries, mixed, hidden, shared;    /* of all, in units of 4 bytes */
    size_t input, line, y, asked, panel, scores, each; /* of a thread */
} Sizes;

INLINE size_t most(size_t a, size_t b) { return a > b ? a : b; }

static Sizes sizes_of(const Model *model, int rows, int positions) {
    int type = input_type(model), ffn = ceil_div(model->ffn, PANEL) * PANEL;
    int shared = shared_type(type);
    int widest = type == INT8 ? (int)most(most(model->hidden, model->query_width), ffn) : model->hidden;
    size_t m = (size_t)rows, head = padded((size_t)model->head_dim);
    Sizes sizes = {
        .ffn = ffn,
        .widest = widest,
        .rows = padded(m * sizeof(Row) / 4),
        .x = padded(m * model->hidden),
        .queries = padded(m * model->query_width),
        .mixed = input_of(shared, rows, model->query_width),
        .hidden = input_of(shared, rows, ffn),
        .input = input_of(type, rows, widest),
        .line = most(padded((size_t)model->hidden), head),
        .y = most(m, ASKED) * head,
        .asked = input_of(model->cache, ASKED, model->head_dim),
        .panel = PANEL * head,
        .scores = ASKED * padded((size_t)positions),
    };
    sizes.shared = sizes.rows + sizes.x + sizes.queries + sizes.mixed + sizes.hidden + sizes.input;
    sizes.each = sizes.input + sizes.line + 2 * sizes.y + sizes.asked + sizes.panel + sizes.scores;
    return sizes;
}

static Thread thread_of(const Pass *pass, float *memory, const Sizes *sizes) {
    const Model *model = pass->model;
    Thread thread = {.number = omp_get_thread_num(), .count = omp_get_num_threads()};
    float *own = memory + sizes->shared + sizes->each * (size_t)thread.number;
    thread.input = input_at(own, input_type(model), pass->num_rows, sizes->widest, pass->num_rows),
    own += sizes->input;
    thread.line = own, own += sizes->line;
    thread.y = own, own += sizes->y;
    thread.z = own, own += sizes->y;
    thread.asked = input_at(own, model->cache, ASKED, model->head_dim, pass->num_rows), own += sizes->asked;
    thread.panel = (words *)own, own += sizes->panel;
    thread.scores = own;
    thread.num_scores = sizes->scores / ASKED;
    return thread;
}

/* y [num_rows][outputs] = x [num_rows][inputs] times a map, without its bias: one product on its own. */
int nestling_product(const Map *map, int outputs, int inputs, const float *x, int num_rows, int num_threads,
                     float *y) {
    int type = inputs_for((int)map->type), panels = ceil_div(outputs, PANEL), n = depth(type, inputs);
    size_t input = input_of(type, num_rows, inputs), own = (size_t)num_rows * PANEL;
    float *memory = aligned_alloc(64, 4 * (input + own * (size_t)num_threads));
    if (memory == NULL) return 1;
    Input placed = input_at(memory, type, num_rows, inputs, num_rows);
    for (int r = 0; r < num_rows; r++) place_row(type, x + (size_t)r * inputs, inputs, placed, r);
#pragma omp parallel num_threads(num_threads)
    {
        Thread thread = {.number = omp_get_thread_num(), .count = omp_get_num_threads()};
        float *made = memory + input + own * (size_t)thread.number;
        Range mine = share(&thread, panels);
        begin_tiles(placed.together);
        for (int p = mine.first; p < mine.last; p++) {
            int first = p * PANEL, count = first + PANEL < outputs ? PANEL : outputs - first;
            product(*map, p, n, placed, made, PANEL);
            for (int r = 0; r < num_rows; r++)
                memcpy(y + (size_t)r * outputs + first, made + (size_t)r * PANEL, 4 * (size_t)count);
        }
        end_tiles();
    }
    free(memory);
    return 0;
}

/* Passes over some tokens of each request; `first` are the rows of logits where each one's begin.

   Returns 0, or 1 if there is no memory. */
static int read_tokens(const Model *model, const Request *requests, int num_requests, const int64_t *tokens,
                       const int32_t *first, int num_threads, float *logits) {
    int total = 0, positions = 0;
    for (int i = 0; i < num_requests; i++) {
        int end = requests[i].length + requests[i].count;
        total += requests[i].count;
        positions = end > positions ? end : positions;
    }
    Sizes sizes = sizes_of(model, total < MAX_ROWS ? total : MAX_ROWS, positions);
    float *memory = aligned_alloc(64, 4 * (sizes.shared + sizes.each * (size_t)num_threads));
    if (memory == NULL) return 1;
    Row *rows = (Row *)memory;
    float *x = memory + sizes.rows, *queries = x + sizes.x, *mixed = queries + sizes.queries;
    Pass pass = {.model = model, .rows = rows, .x = x, .queries = queries, .logits = logits};
    int request = 0, token = 0; /* the next one to run: of which request, and which of its tokens */
    for (int done = 0; done < total; done += pass.num_rows) {
        pass.num_rows = pass.num_scored = 0;
        while (pass.num_rows < MAX_ROWS && request < num_requests) {
            const Request *of = requests + request;
            int scored = token - (of->count - of->scored);
            rows[pass.num_rows] = (Row){of, tokens[done + pass.num_rows], of->length + token,
                                        scored < 0 ? -1 : first[request] + scored};
            pass.num_scored += scored >= 0;
            pass.num_rows++;
            if (++token == of->count) request++, token = 0;
        }
        int type = shared_type(input_type(model)), m = pass.num_rows;
        pass.mixed = input_at(mixed, type, m, model->query_width, m);
        pass.hidden = input_at(mixed + sizes.mixed, type, m, sizes.ffn, m);
        pass.input = input_at(mixed + sizes.mixed + sizes.hidden, input_type(model), m, sizes.widest, m);
        embed(&pass);
#pragma omp parallel num_threads(num_threads)
        {
            Thread thread = thread_of(&pass, memory, &sizes);
            run(&pass, &thread);
        }
    }
    free(memory);
    return 0;
}

/* Write keys and values of all tokens behind the committed ones, and rows [num_outputs] of each request: the
   logits of those scored and of all drawn tokens but the last, or their laws where these are not the
   likeliest.

   tokens: of all requests, one after another. Returns 0, or 1 if there is no memory. */
int nestling_step(const Model *model, const Request *requests, int num_requests, const int64_t *tokens,
                  int num_threads, float *rows) {
    size_t each = sizeof(Request) + sizeof(int64_t) + 2 * sizeof(int32_t);
    Request *asked = malloc(each * (size_t)num_requests);
    if (asked == NULL) return 1;
    int64_t *drawn = (int64_t *)(asked + num_requests);
    int32_t *first = (int32_t *)(drawn + num_requests), *last = first + num_requests;
    int longest = 0;
    for (int i = 0, outputs = 0; i < num_requests; i++) {
        const Request *of = requests + i;
        first[i] = outputs, outputs += of->scored + (of->num_draws ? of->num_draws - 1 : 0);
        longest = of->num_draws > longest ? of->num_draws : longest;
    }
    int failed = read_tokens(model, requests, num_requests, tokens, first, num_threads, rows);
    for (int draw = 0; draw < longest && !failed; draw++) {
        int going = 0;
        for (int i = 0; i < num_requests; i++) {
            const Request *of = requests + i;
            if (draw >= of->num_draws) continue;
            int row = first[i] + of->scored - 1 + draw;
            float *law = rows + (size_t)row * model->num_outputs;
            of->chosen[draw] = choose(&of->law, law, model->num_outputs, model->outputs, draw);
            if (draw + 1 == of->num_draws) continue;
            drawn[going] = of->chosen[draw];
            last[going] = row + 1;
            asked[going++] = (Request){.keys = of->keys,
                                       .values = of->values,
                                       .positions = of->positions,
                                       .length = of->length + of->count + draw,
                                       .count = 1,
                                       .scored = 1};
        }
        if (going) failed = read_tokens(model, asked, going, drawn, last, num_threads, rows);
    }
    free(asked);
    return failed;
}
