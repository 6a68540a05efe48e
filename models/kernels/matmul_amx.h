/* Products of a panel and up to 16 rows by the processor's tiles (AMX), where it has them. */

#pragma once

#include "pack.h"

#ifdef MULTIPLIES_TILES
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the system lets this process use tiles; the library asks when it is opened. */
int nestling_has_tiles;

__attribute__((constructor)) static void ask_for_tiles(void) {
    enum { ASK = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, and its argument */
    nestling_has_tiles = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

/* From here to `end_tiles` a thread may multiply up to `tile_rows` rows at once: the time that a tile takes
   is that of its rows. Tiles 0 to 2 are for many, 5 to 7 for one: sums, and inputs; 3 and 4 are of
   weights. */
INLINE void begin_tiles(int tile_rows) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 4 * TILE;
        shape.rows[i] = (uint8_t)(i < 3 ? tile_rows : i < 5 ? TILE : 1);
    }
    if (!nestling_has_tiles) return;
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* the compiler does not know how much of it is read */
    _tile_loadconfig(&shape);
}

INLINE void end_tiles(void) {
    if (nestling_has_tiles) _tile_release();
}

/* `block` for up to a tile of rows of BF16 or INT8. In BF16 its sums run in another order than those of
   `block`, which then no row has; whole numbers have the same sum in any. Entries beyond whole tiles follow.
 */
INLINE void block_of_tiles(int type, int rows, const words *weights, const float *scales, int n, Input input,
                           int first, float *y, size_t stride) {
    words found[VECTORS][TILE];
    const char *x = entries_of(type, input, first);
    size_t each = row_of(input.room) * input_size(type);
    int i = 0, ahead = rows == 1 ? VECTORS * TILE : 0; /* more rows are not so close to the rate of memory */
#define MULTIPLY_TILES(left, right, inputs)                                                                  \
    _tile_zero(left);                                                                                        \
    _tile_zero(right);                                                                                       \
    for (; i + TILE <= n; i += TILE) {                                                                       \
        for (int k = 0; k < ahead; k++) __builtin_prefetch(weights + (i + AHEAD) * VECTORS + k);             \
        _tile_loadd(inputs, x + 4 * i, each);                                                                \
        _tile_loadd(3, weights + i * VECTORS, VECTORS * sizeof(words));                                      \
        _tile_loadd(4, weights + i * VECTORS + 1, VECTORS * sizeof(words));                                  \
        if (type == INT8) {                                                                                  \
            _tile_dpbsud(left, inputs, 3);                                                                   \
            _tile_dpbsud(right, inputs, 4);                                                                  \
        } else {                                                                                             \
            _tile_dpbf16ps(left, inputs, 3);                                                                 \
            _tile_dpbf16ps(right, inputs, 4);                                                                \
        }                                                                                                    \
    }                                                                                                        \
    _tile_stored(left, found[0], sizeof(words));                                                             \
    _tile_stored(right, found[1], sizeof(words));
    if (rows == 1) {
        MULTIPLY_TILES(5, 6, 7)
    } else {
        MULTIPLY_TILES(0, 1, 2)
    }
#undef MULTIPLY_TILES
    __asm__ volatile("" : : "r"(found) : "memory"); /* the compiler does not know what a tile's store does */
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < VECTORS; h++) {
            words sums = found[h][r];
            for (int k = i; k < n; k++) {
                words w = weights[k * VECTORS + h];
                sums = type == INT8 ? add_four(sums, w, x + r * each, (size_t)k)
                                    : (words)add_pair((lanes)sums, w, x + r * each, (size_t)k);
            }
            lanes values =
                type == INT8 ? dequantize(type, sums, input, first + r, scales + h * LANES) : (lanes)sums;
            store(values, y + r * stride + h * LANES);
        }
}

INLINE void by_tiles(int type, const words *weights, const float *scales, int n, Input input, float *y,
                     size_t stride) {
    int groups = ceil_div(input.rows, input.tile_rows);
    for (int group = 0, row = 0, end; group < groups; group++, row = end) {
        end = input.rows * (group + 1) / groups;
        block_of_tiles(type, end - row, weights, scales, n, input, row, y + row * stride, stride);
    }
}
#else
INLINE void begin_tiles(int tile_rows) { (void)tile_rows; }
INLINE void end_tiles(void) {}
#endif
