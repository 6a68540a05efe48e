/* What tests/models/kernels/test_arm.py runs under emulation: a product, or passes of a model, that it is given on
   stdin; results go to stdout. Numbers are int32, arrays follow as they lie in memory. */

#include <stdio.h>

#include "decode_step.c"

static void *read_bytes(size_t size) {
    void *memory =
        aligned_alloc(64, (size + 64 + 16384) / 64 * 64); /* weights are prefetched beyond their end */
    if (memory == NULL || fread(memory, 1, size, stdin) != size) exit(1);
    return memory;
}

static int32_t read_int(void) {
    int32_t value;
    if (fread(&value, 4, 1, stdin) != 1) exit(1);
    return value;
}

static void *read_some(void) { /* NULL for nothing */
    int32_t size = read_int();
    return size ? read_bytes((size_t)size) : NULL;
}

static Map read_map(void) {
    Map map = {0};
    map.type = read_int(), map.entries = read_int();
    map.panels = read_some(), map.scales = read_some();
    return map;
}

static void run_product(void) {
    Map map = read_map();
    int outputs = read_int(); /* in statements of their own, which keep their order */
    int inputs = read_int();
    int rows = read_int();
    const float *x = read_some();
    float *y = malloc(4 * (size_t)rows * outputs);
    if (nestling_product(&map, outputs, inputs, x, rows, 2, y)) exit(1);
    fwrite(y, 4, (size_t)rows * outputs, stdout);
}

static void run_passes(void) {
    Model model = {.cache = FP32, .embedding = FP32, .epsilon = 1e-5f};
    int32_t *sizes[] = {&model.hidden, &model.head_dim,   &model.heads_per_group, &model.query_width,
                        &model.ffn,    &model.num_layers, &model.num_outputs};
    for (int i = 0; i < 7; i++) *sizes[i] = read_int();
    int groups = read_int();
    Layer *layers = calloc((size_t)model.num_layers, sizeof(Layer));
    for (int i = 0; i < model.num_layers; i++) {
        Layer *layer = layers + i;
        Map *maps[] = {&layer->query, &layer->key, &layer->value, &layer->output,
                       &layer->gate,  &layer->up,  &layer->down};
        for (int k = 0; k < 7; k++) *maps[k] = read_map();
        layer->attention_norm = read_some(), layer->ffn_norm = read_some();
        layer->index = i, layer->groups = groups, layer->ffn = model.ffn, layer->rotates = 1;
    }
    model.layers = layers, model.head = read_map();
    model.embeddings = read_some(), model.cosines = read_some(), model.sines = read_some();
    model.norm = read_some();
    int positions = read_int();
    int num_tokens = read_int();
    int num_passes = read_int();
    int num_draws = read_int();
    const int64_t *tokens = read_some();
    const double *uniforms = read_some();
    void **stores = calloc(2 * (size_t)model.num_layers, sizeof(void *));
    for (int i = 0; i < 2 * model.num_layers; i++)
        stores[i] = calloc((size_t)groups * positions * model.head_dim, 4);
    float *rows = calloc((size_t)(num_tokens + num_draws) * model.num_outputs, 4);
    int64_t chosen[16] = {0};
    for (int pass = 0; pass < num_passes;
         pass++) { /* the same tokens, in this many passes; the last one draws */
        int first = num_tokens * pass / num_passes, end = num_tokens * (pass + 1) / num_passes;
        Request request = {.keys = stores,
                           .values = stores + model.num_layers,
                           .positions = positions,
                           .length = first,
                           .count = end - first,
                           .scored = end - first,
                           .num_draws = pass + 1 == num_passes ? num_draws : 0,
                           .sampling = {.temperature = 1, .top_p = 1, .uniforms = uniforms},
                           .chosen = chosen};
        if (nestling_step(&model, &request, 1, tokens + first, 2, rows + (size_t)first * model.num_outputs))
            exit(1);
    }
    fwrite(rows, 4, (size_t)(num_tokens + num_draws - 1) * model.num_outputs, stdout);
    fwrite(chosen, 8, (size_t)num_draws, stdout);
}

int main(void) {
    (read_int() ? run_passes : run_product)();
    return 0;
}
