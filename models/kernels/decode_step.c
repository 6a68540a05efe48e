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

#include "decode_layers.h"
#include "pack_rows.h"

/* The instruction set that this was compiled for, in 32 bytes. */
const char nestling_instructions[32] =
#if defined(__AVX512F__)
    "AVX-512"
#if defined(MULTIPLIES_TILES)
    " and AMX";
#elif defined(__AVX512BF16__)
    ", BF16";
#elif defined(__AVX512VNNI__)
    ", VNNI";
#else
    ;
#endif
#elif defined(__AVX2__) && defined(__AVXVNNI__)
    "AVX2, VNNI";
#elif defined(__AVX2__)
    "AVX2";
#elif defined(__aarch64__)
    "Arm NEON";
#else
    "any processor";
#endif

typedef struct {
    int ffn, widest;                                         /* values of a row of `hidden`, of an input */
    size_t rows, x, queries, mixed, hidden, shared;          /* of all, in units of 4 bytes */
    size_t input, line, y, query_input, panel, scores, each; /* of a thread */
} Sizes;

INLINE size_t most(size_t a, size_t b) { return a > b ? a : b; }

static Sizes sizes_of(const Model *model, int rows, int positions) {
    int type = input_type(model), ffn = ceil_div(model->ffn, PANEL) * PANEL;
    int shared = shared_type(type);
    int widest = is_scaled(type) ? (int)most(most(model->hidden, model->query_width), ffn) : model->hidden;
    size_t m = (size_t)rows, head = padded((size_t)model->head_dim);
    Sizes sizes = {
        .ffn = ffn,
        .widest = widest,
        .rows = padded(m * sizeof(Row) / 4),
        .x = padded(m * model->hidden),
        .queries = padded(m * model->query_width),
        .mixed = input_of(shared, rows, model->query_width),
        .hidden = input_of(shared, rows, ffn),
        .input = most(input_of(type, rows, widest), input_of(head_type(model), rows, model->hidden)),
        .line = most(padded((size_t)model->hidden), head),
        .y = most(m, MAX_QUERIES) * head,
        .query_input = input_of(model->cache, MAX_QUERIES, model->head_dim),
        .panel = PANEL * head,
        .scores = MAX_QUERIES * padded((size_t)positions),
    };
    sizes.shared = sizes.rows + sizes.x + sizes.queries + sizes.mixed + sizes.hidden + sizes.input;
    sizes.each = sizes.input + sizes.line + 2 * sizes.y + sizes.query_input + sizes.panel + sizes.scores;
    return sizes;
}

static Thread thread_of(const Pass *pass, float *memory, const Sizes *sizes) {
    const Model *model = pass->model;
    Thread thread = {.number = omp_get_thread_num(), .count = omp_get_num_threads()};
    float *own = memory + sizes->shared + sizes->each * (size_t)thread.number;
    thread.input = input_at(own, input_type(model), pass->num_rows, sizes->widest, pass->num_rows),
    thread.head_input = input_at(own, head_type(model), pass->num_rows, model->hidden, pass->num_rows),
    own += sizes->input;
    thread.line = own, own += sizes->line;
    thread.y = own, own += sizes->y;
    thread.z = own, own += sizes->y;
    thread.query_input = input_at(own, model->cache, MAX_QUERIES, model->head_dim, pass->num_rows),
    own += sizes->query_input;
    thread.panel = (words *)own, own += sizes->panel;
    thread.scores = own;
    thread.num_scores = sizes->scores / MAX_QUERIES;
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
        Range mine = range_of(&thread, panels);
        begin_tiles(placed.tile_rows);
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

/* Write keys and values of all tokens behind the committed ones, and rows [num_outputs] of each request:
   logits of those scored and of all drawn tokens but the last, or the probabilities that one was drawn with.

   tokens: of all requests, one after another. Returns 0, or 1 if there is no memory. */
int nestling_step(const Model *model, const Request *requests, int num_requests, const int64_t *tokens,
                  int num_threads, float *rows) {
    size_t each = sizeof(Request) + sizeof(int64_t) + 2 * sizeof(int32_t);
    Request *active = malloc(each * (size_t)num_requests);
    if (active == NULL) return 1;
    int64_t *drawn = (int64_t *)(active + num_requests);
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
            float *logits = rows + (size_t)row * model->num_outputs;
            of->chosen[draw] = choose(&of->sampling, logits, model->num_outputs, model->outputs, draw);
            if (draw + 1 == of->num_draws) continue;
            drawn[going] = of->chosen[draw];
            last[going] = row + 1;
            active[going++] = (Request){.keys = of->keys,
                                        .values = of->values,
                                        .positions = of->positions,
                                        .length = of->length + of->count + draw,
                                        .count = 1,
                                        .scored = 1};
        }
        if (going) failed = read_tokens(model, active, going, drawn, last, num_threads, rows);
    }
    free(active);
    return failed;
}
