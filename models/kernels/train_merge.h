/* A member's prefix of a matrix as its products read it, of models/kernels/train_ops.c: merged = weight +
   scale b a, rounded once, and the gradients of all three. */

#pragma once

#include "train_attention.h"

typedef struct {
    int32_t type, rank; /* of merged and of its gradient; 0 without b and a */
    int64_t rows, columns, all_rows, all_columns;
    float scale;
    const float *weight, *b, *a; /* [all_rows][all_columns], [rows][rank], [rank][columns] */
    void *merged;                /* [rows][columns]; in the backward pass its gradient, which is read */
    float *weight_grad;          /* 0 behind the prefix, or NULL; of the backward pass alone, as the rest */
    float *b_grad, *a_grad;
} Merge;

/* Rows, and columns, that a thread is at before it asks for more. */
enum { MERGED_ROWS = 48, MERGED_COLUMNS = 2 * PANEL };

/* Of some rows: merged = weight + b (scale a). */
static void merge_rows(const Merge *of, int64_t first, int count, int width, const float *scaled_a,
                       float *block) {
    for (int i = 0; i < count; i++)
        load_row(FP32, of->weight, (size_t)((first + i) * of->all_columns), (int)of->columns, 1,
                 block + i * width);
    multiply(count, width, of->rank, of->b + first * of->rank, (size_t)of->rank, 1, scaled_a, (size_t)width,
             block, (size_t)width, 1);
    for (int i = 0; i < count; i++)
        store_row(of->type, block + i * width, 1, (int)of->columns, of->merged,
                  (size_t)((first + i) * of->columns));
}

/* Of some rows: the gradient in fp32, the weight's, and b_grad = gradient (scale a)'. */
static void merge_rows_back(const Merge *of, int64_t first, int count, int width, const float *transposed_a,
                            int ranks, float *grad, float *part) {
    size_t columns = (size_t)of->columns, rest = (size_t)of->all_columns - columns;
    for (int i = 0; i < count; i++) {
        load_row(of->type, of->merged, (size_t)(first + i) * columns, (int)columns, 1, grad + i * width);
        memset(grad + i * width + columns, 0, 4 * ((size_t)width - columns));
        if (of->weight_grad == NULL) continue;
        float *row = of->weight_grad + (first + i) * of->all_columns;
        memcpy(row, grad + i * width, 4 * columns);
        memset(row + columns, 0, 4 * rest);
    }
    if (of->rank == 0) return;
    multiply(count, ranks, (int)columns, grad, (size_t)width, 1, transposed_a, (size_t)ranks, part,
             (size_t)ranks, 0);
    for (int i = 0; i < count; i++)
        memcpy(of->b_grad + (first + i) * of->rank, part + i * ranks, 4 * (size_t)of->rank);
}

/* Of some columns: a_grad = scale b' gradient, a sum over all rows in their order. */
static void merge_columns_back(const Merge *of, int64_t first, int width, const float *grad, float *part) {
    int count = (int)(of->columns - first < MERGED_COLUMNS ? of->columns - first : MERGED_COLUMNS);
    multiply(of->rank, (int)padded((size_t)count), (int)of->rows, of->b, 1, (size_t)of->rank, grad + first,
             (size_t)width, part, MERGED_COLUMNS, 0);
    for (int k = 0; k < of->rank; k++)
        store_row(FP32, part + k * MERGED_COLUMNS, of->scale, count, of->a_grad,
                  (size_t)(k * of->columns + first));
}

/* `merged`, or with `backward` the gradients. Returns 0, or 1 if there is no memory. */
int nestling_merge(const Merge *of, int backward, int num_threads) {
    int width = (int)padded((size_t)of->columns), ranks = ceil_div(of->rank, LANES) * LANES;
    size_t of_a = (size_t)ranks * (size_t)width,
           each = MERGED_ROWS * (size_t)(backward ? ranks : width) + MERGED_COLUMNS * (size_t)ranks;
    size_t all = (2 * of_a + padded(each) * (size_t)num_threads + (backward ? (size_t)of->rows * width : 0));
    float *memory = aligned_alloc(64, 4 * padded(all));
    if (memory == NULL) return 1;
    float *scaled_a = memory, *transposed_a = memory + of_a, *own = transposed_a + of_a,
          *grad = own + padded(each) * (size_t)num_threads;
    memset(scaled_a, 0, 4 * of_a);
    for (int k = 0; k < of->rank; k++)
        load_row(FP32, of->a, (size_t)(k * of->columns), (int)of->columns, of->scale, scaled_a + k * width);
    if (backward) transpose(scaled_a, ranks, width, transposed_a, ranks);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t first = 0; first < of->rows; first += MERGED_ROWS) {
        int count = (int)(of->rows - first < MERGED_ROWS ? of->rows - first : MERGED_ROWS);
        float *mine = own + padded(each) * (size_t)omp_get_thread_num();
        if (backward)
            merge_rows_back(of, first, count, width, transposed_a, ranks, grad + first * width, mine);
        else
            merge_rows(of, first, count, width, scaled_a, mine);
    }
    if (backward && of->weight_grad)
        memset(of->weight_grad + of->rows * of->all_columns, 0,
               4 * (size_t)((of->all_rows - of->rows) * of->all_columns));
    if (backward && of->rank) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
        for (int64_t first = 0; first < of->columns; first += MERGED_COLUMNS)
            merge_columns_back(of, first, width, grad,
                               own + padded(each) * (size_t)omp_get_thread_num());
    }
    free(memory);
    return 0;
}
