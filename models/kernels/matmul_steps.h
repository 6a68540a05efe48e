/* Register blocks of models/kernels/matmul.h where a panel is several of them side by side: AVX2, Arm.

   An entry of weights is multiplied in steps, each with one word of a row's inputs: there are few registers,
   and so a step unpacks what it needs and no more. */

#pragma once

/* Steps of an entry: the words of inputs that it is multiplied with. */
INLINE int steps_of(int type) {
    return type == FP32 ? 1 : type == BF16 ? 2 : type == INT8 ? 1 + WIDE_CODES : 2 + 2 * WIDE_CODES;
}

INLINE words unpack(int type, int step, words entry) {
    if (type == FP32) return entry;
    if (type == BF16) return step ? entry & 0xffff0000u : entry << 16;
    int pairs = 1 + WIDE_CODES; /* of 16 bits are the first and third byte, then the second and fourth */
    if (type == INT4) entry = entry >> (4 * (step / pairs)) & 0x0f0f0f0fu;
    if (type == INT8 && SIGNED_CODES) entry ^= 0x80808080u;
    return WIDE_CODES ? entry >> (8 * (step % pairs)) & 0x00ff00ffu : entry;
}

/* Add an entry's products to sums, or to those of codes, by a word of each row's inputs at each step. */
INLINE void multiply_entry(int type, int rows, int vectors, const words *entry, const int32_t *const *x,
                           int at, lanes sums[][VECTORS], words counts[][VECTORS]) {
#pragma GCC unroll 4
    for (int step = 0; step < steps_of(type); step++) {
        words w[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) w[v] = unpack(type, step, entry[v]);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t value = x[r][at + step];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                if (type == INT8 || type == INT4)
                    counts[r][v] = add_codes(counts[r][v], w[v], value);
                else
                    sums[r][v] = fused((lanes)w[v], spread(number((uint32_t)value)), sums[r][v]);
        }
    }
}

INLINE void prefetch(const char *from, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

/* y [rows][vectors of a panel], its rows `stride` apart, of the input's rows from `first` on: entries
   [begin, end) of n, after those before. `scales` of the outputs are those of INT8 and INT4. Each entry
   prefetches `bytes` of the weights from `ahead` on. */
INLINE void block(int type, int rows, int vectors, const words *weights, const float *scales, int begin,
                  int end, int n, Input input, int first, float *y, size_t stride, const char *ahead,
                  size_t bytes) {
    lanes sums[BLOCK_ROWS][VECTORS];
    words counts[BLOCK_ROWS][VECTORS]; /* of codes: as another type they would be moved at every step */
    int codes = type == INT8 || type == INT4;
    const int32_t *x[BLOCK_ROWS];
    for (int r = 0; r < rows; r++) {
        x[r] = (const int32_t *)entries_of(codes ? INT8 : type, input, first + r);
        for (int v = 0; v < vectors; v++) {
            const float *before = y + r * stride + v * LANES;
            sums[r][v] = begin && !codes ? load(before) : (lanes){0};
            counts[r][v] = begin && codes ? *(const loose_words *)before : (words){0};
        }
    }
#define MULTIPLY_ENTRIES                                                                                     \
    for (int i = begin; i < end; i++, ahead += bytes) {                                                      \
        prefetch(ahead, vectors * sizeof(words));                                                            \
        multiply_entry(type, rows, vectors, weights + (size_t)i * VECTORS, x, i * steps_of(type), sums,      \
                       counts);                                                                              \
    }
    if (type == FP32 && rows * vectors < BLOCK_ROWS * BLOCK_VECTORS) {
        /* So few sums have to wait for the ones before, less so where two entries are at work. */
#pragma GCC unroll 2
        MULTIPLY_ENTRIES
    } else {
        MULTIPLY_ENTRIES
    }
#undef MULTIPLY_ENTRIES
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            float *to = y + r * stride + v * LANES;
            if (codes && end < n)
                *(loose_words *)to = counts[r][v];
            else if (codes)
                store(dequantize(type, counts[r][v], input, first + r, scales + v * LANES), to);
            else
                store(sums[r][v], to);
        }
}

/* Entries that all rows pass by before the next: they stay in the nearest cache, and those of the next chunk
   are prefetched meanwhile, some at a time. */
enum { CHUNK = 64 };

/* Rows of a register block: with pairs gcc would need one register more than there are. */
INLINE int rows_of_block(int type) { return type == BF16 && LANES == 8 ? BLOCK_ROWS - 1 : BLOCK_ROWS; }

/* Few rows pass by all of a panel at once; more by a part of it after another. */
#define FEW_ROWS(count)                                                                                      \
    case count:                                                                                              \
        if (count * PARTS <= BLOCK_ROWS)                                                                     \
            block(type, count, VECTORS, weights, scales, 0, n, n, input, 0, y, stride,                       \
                  (const char *)(weights + AHEAD * VECTORS), VECTORS * sizeof(words));                       \
        return;
#define MORE_ROWS(count) /* of those that an even split comes to */                                          \
    case count:                                                                                              \
        if (count <= rows_of_block(type) &&                                                                  \
            (count * PARTS > BLOCK_ROWS || 2 * count >= rows_of_block(type)))                                \
            block(type, count, BLOCK_VECTORS, weights + from, scales + from * LANES, begin, end, n, input,   \
                  row, y + row * stride + from * LANES, stride, next, bytes);                                \
        break;

INLINE void by_vectors(int type, const words *weights, const float *scales, int depth, Input input, float *y,
                       size_t stride) {
    int n = type == INT4 ? ceil_div(depth, 2) : depth;
    int rows = input.rows, blocks = ceil_div(rows, rows_of_block(type));
    if (rows * PARTS <= BLOCK_ROWS) switch (rows) {
            FEW_ROWS(1) FEW_ROWS(2) FEW_ROWS(3)
        }
    size_t bytes = VECTORS * sizeof(words) / (size_t)(blocks * PARTS);
    for (int begin = 0, end; begin < n; begin = end) {
        end = begin + CHUNK < n ? begin + CHUNK : n;
        const char *next = (const char *)(weights + (size_t)end * VECTORS);
        for (int b = 0; b < blocks; b++) {
            int row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
            for (int from = 0; from < VECTORS; from += BLOCK_VECTORS, next += CHUNK * bytes) {
                switch (count) {
                    MORE_ROWS(1) MORE_ROWS(2) MORE_ROWS(3) MORE_ROWS(4) MORE_ROWS(5) MORE_ROWS(6)
                }
            }
        }
    }
}
#undef FEW_ROWS
#undef MORE_ROWS
