/* Weights packed in panels, as models/kernels/pack.h lays them out: rows in FP32 or BF16, to FP32, BF16 or INT8.

   The result is that of models/kernels/pack.py, in one walk over the weight instead of several. */

#pragma once

#include "pack.h"

typedef struct {
    const void *weight;
    int64_t source, type;                     /* of the numbers as they are, and as they are packed */
    int64_t rows, columns, stride, head_rows; /* each head of so many rows begins a panel */
    void *panels;
    float *scales; /* INT8's */
} Packing;

/* A row in 8 bits, 128 more than the codes mean; returns its scale. */
static float pack_codes(const float *values, int count, int padded_count, uint8_t *to) {
    float scale = largest_size(values, count) / 127.0f;
    if (scale < 1e-30f) scale = 1e-30f; /* as models/kernels/codes.py */
#pragma omp simd
    for (int i = 0; i < count; i++) {
        float code = rintf(values[i] / scale);
        code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
        to[i] = (uint8_t)((int32_t)code + 128);
    }
    for (int i = count; i < padded_count; i++) to[i] = 128;
    return scale;
}

/* One panel: rows [first, first + count) of the weight, and zeros. `line` has room for a row of numbers, and
   `packed` for the words of all. */
static void pack_panel(const Packing *packing, int64_t panel, int64_t first, int count, float *line,
                       uint32_t *packed) {
    int type = (int)packing->type, columns = (int)packing->columns, entries = depth(type, columns);
    uint32_t *to = (uint32_t *)packing->panels + (size_t)panel * entries * PANEL;
    const uint32_t *of[PANEL];
    for (int r = 0; r < PANEL; r++) {
        uint32_t *words = packed + (size_t)r * entries;
        size_t at = (size_t)(first + r) * packing->stride;
        of[r] = words;
        if (r < count) load_row((int)packing->source, packing->weight, at, columns, 1, line);
        if (type == INT8) {
            float scale = r < count ? pack_codes(line, columns, 4 * entries, (uint8_t *)words) : 0;
            if (r >= count) memset(words, 128, 4 * (size_t)entries);
            packing->scales[panel * PANEL + r] = scale;
        } else {
            memset(words, 0, 4 * (size_t)entries);
            if (r < count) store_row(type, line, 1, columns, words, 0);
        }
    }
    int done = 0;
    for (; done + LANES <= entries; done += LANES)
        for (int h = 0; h < VECTORS; h++)
            transpose_square(of + h * LANES, (size_t)done, to + (size_t)done * PANEL + h * LANES, PANEL);
    for (int i = done; i < entries; i++)
        for (int r = 0; r < PANEL; r++) to[(size_t)i * PANEL + r] = of[r][i];
}

/* Returns 0, or 1 if there is no memory. */
int nestling_pack(const Packing *packing, int num_threads) {
    int64_t each = packing->head_rows, parts = (each + PANEL - 1) / PANEL;
    int64_t panels = packing->rows / each * parts;
    size_t line = padded((size_t)packing->columns + LANES);
    size_t own = line + padded((size_t)PANEL * depth((int)packing->type, (int)packing->columns));
    float *memory = aligned_alloc(64, 4 * own * (size_t)num_threads);
    if (memory == NULL) return 1;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        float *mine = memory + own * (size_t)omp_get_thread_num();
        int64_t within = panel % parts * PANEL, left = each - within;
        pack_panel(packing, panel, panel / parts * each + within, (int)(left < PANEL ? left : PANEL), mine,
                   (uint32_t *)(mine + line));
    }
    free(memory);
    return 0;
}
