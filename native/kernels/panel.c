/* Panels: interleaving, the scalar reference kernel, the choice of a kernel, and the loops over panels that
 * all kernels share. */
#include "kernels/panel.h"
#include "codec/trellis.h"

#include <stdlib.h>

static const uint8_t quad_order[PTQTP_UNIT] = { PTQTP_QUAD_ORDER };

size_t ptqtp_panels_size(int form, int64_t nrows, int64_t n) {
    const int64_t npanels = nrows / PTQTP_PANEL_ROWS + (nrows % PTQTP_PANEL_ROWS != 0);
    size_t tiles, size;
    if (nrows < 0 || n < 0 || __builtin_mul_overflow((size_t) npanels, (size_t) (n / PTQTP_UNIT), &tiles) ||
        __builtin_mul_overflow(tiles, (size_t) ptqtp_tile_size(form), &size)) {
        return SIZE_MAX; /* no allocator has that */
    }
    return size;
}

static void tile_put(uint8_t * tile, int row, const ptqtp_unit * u) {
    for (int p = 0; p < 3; p++) {
        memcpy(tile + 64 * p + 4 * row, u->q + 4 * p, 4);
    }
    memcpy(tile + 192 + 2 * row, &u->side, 2);
}

static void tile_get(const uint8_t * tile, int row, ptqtp_unit * u) {
    for (int p = 0; p < 3; p++) {
        memcpy(u->q + 4 * p, tile + 64 * p + 4 * row, 4);
    }
    memcpy(&u->side, tile + 192 + 2 * row, 2);
}

/* Codes in quad order. */
static void unit_codes(int type, const ptqtp_unit * u, uint8_t codes[PTQTP_UNIT]) {
    int8_t levels[PTQTP_UNIT];
    ptqtp_unit_levels(type, u, levels);
    for (int i = 0; i < PTQTP_UNIT; i++) {
        codes[i] = (uint8_t) (levels[quad_order[i]] + PTQTP_LEVEL_BIAS);
    }
}

static void wide_put(int type, uint8_t * tile, int row, const ptqtp_unit * u) {
    uint8_t codes[PTQTP_UNIT];
    unit_codes(type, u, codes);
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 4; k++) {
            tile[64 * i + 4 * row + k] = (uint8_t) (codes[4 * i + k] | codes[4 * (i + 4) + k] << 4);
        }
    }
    tile[256 + row] = u->side;
}

static void wide_get(int type, const uint8_t * tile, int row, ptqtp_unit * u) {
    uint8_t digit_of[16] = { 0 }, digits[PTQTP_UNIT];
    int8_t levels[PTQTP_UNIT];
    for (int d = 0; d < 9; d++) {
        digit_of[ptqtp_level[d] + PTQTP_LEVEL_BIAS] = (uint8_t) d;
    }
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 4; k++) {
            const uint8_t two = tile[64 * i + 4 * row + k];
            levels[quad_order[4 * i + k]] = (int8_t) ((two & 15) - PTQTP_LEVEL_BIAS);
            levels[quad_order[4 * (i + 4) + k]] = (int8_t) ((two >> 4) - PTQTP_LEVEL_BIAS);
        }
    }
    if (type != PTQTP_TP2_2) {
        for (int i = 0; i < PTQTP_UNIT; i++) {
            digits[i] = digit_of[levels[i] + PTQTP_LEVEL_BIAS];
        }
    } else if (!ptqtp_trellis_digits(levels, digits)) {
        memset(digits, 4, sizeof digits); /* levels that no unit has */
    }
    ptqtp_unit_pack(digits, tile[256 + row], u);
}

void ptqtp_panels_from_rows(int type, int form, const void * rows, void * panels, int64_t first, int64_t nrows,
                            int64_t n) {
    const int64_t ntiles = n / PTQTP_UNIT;
    const ptqtp_unit * src = rows;
    ptqtp_unit zero;
    uint8_t zeros[PTQTP_UNIT];
    memset(zeros, 4, sizeof zeros);
    ptqtp_unit_pack(zeros, 0, &zero);
    uint8_t * panel = (uint8_t *) panels + ptqtp_panels_size(form, first, n);
    for (int64_t row = 0; row < nrows; row += PTQTP_PANEL_ROWS) {
        for (int64_t t = 0; t < ntiles; t++, panel += ptqtp_tile_size(form)) {
            for (int r = 0; r < PTQTP_PANEL_ROWS; r++) {
                const ptqtp_unit * u = row + r < nrows ? &src[(row + r) * ntiles + t] : &zero;
                if (form == PTQTP_WIDE) {
                    wide_put(type, panel, r, u);
                } else {
                    tile_put(panel, r, u);
                }
            }
        }
    }
}

void ptqtp_rows_from_panels(int type, int form, const void * panels, void * rows, int64_t first, int64_t nrows,
                            int64_t n) {
    const int64_t ntiles = n / PTQTP_UNIT;
    ptqtp_unit * dst = rows;
    for (int64_t row = first; row < first + nrows; row++) {
        const uint8_t * tile = (const uint8_t *) panels + row / PTQTP_PANEL_ROWS * ntiles * ptqtp_tile_size(form);
        const int r = (int) (row % PTQTP_PANEL_ROWS);
        for (int64_t t = 0; t < ntiles; t++, tile += ptqtp_tile_size(form), dst++) {
            if (form == PTQTP_WIDE) {
                wide_get(type, tile, r, dst);
            } else {
                tile_get(tile, r, dst);
            }
        }
    }
}

/* ---- the scalar reference ---- */

static void quantize_scalar(const float * x, ptqtp_act * acts, int64_t n) {
    ptqtp_quantize_quads(x, acts, n);
}

static void gemv_quantize_scalar(const float * x, void * acts, int64_t n) {
    ptqtp_quantize_quads(x, acts, n);
}

/* codes: [16 rows][32], level + 6, in the order of the activations */
static void unpack_any_scalar(int type, int64_t ntiles, const void * tiles, uint8_t * codes, float * scales) {
    const uint8_t * tile = tiles;
    for (int64_t t = 0; t < ntiles; t++, tile += PTQTP_TILE_SIZE, scales += PTQTP_PANEL_ROWS) {
        for (int r = 0; r < PTQTP_PANEL_ROWS; r++, codes += PTQTP_UNIT) {
            ptqtp_unit u;
            tile_get(tile, r, &u);
            scales[r] = ptqtp_scale_value(u.side);
            unit_codes(type, &u, codes);
        }
    }
}

static void unpack_scalar(int64_t ntiles, const void * tiles, uint8_t * codes, float * scales) {
    unpack_any_scalar(PTQTP_TP2_1, ntiles, tiles, codes, scales);
}

static void unpack_tp2_2_scalar(int64_t ntiles, const void * tiles, uint8_t * codes, float * scales) {
    unpack_any_scalar(PTQTP_TP2_2, ntiles, tiles, codes, scales);
}

static void unpack_wide_scalar(int64_t ntiles, const void * tiles, uint8_t * codes, float * scales) {
    const uint8_t * tile = tiles;
    for (int64_t t = 0; t < ntiles; t++, tile += PTQTP_WIDE_TILE_SIZE, scales += PTQTP_PANEL_ROWS) {
        for (int r = 0; r < PTQTP_PANEL_ROWS; r++, codes += PTQTP_UNIT) {
            scales[r] = ptqtp_scale_value(tile[256 + r]);
            for (int k = 0; k < PTQTP_UNIT; k++) {
                codes[k] = tile[64 * (k / 4 % 4) + 4 * r + k % 4] >> (k < 16 ? 0 : 4) & 15;
            }
        }
    }
}

static void gemm_scalar(int64_t ntiles, const uint8_t * codes, const float * scales, int ncols,
                        const ptqtp_act * const * acts, float * const * y, bool add) {
    for (int c = 0; c < ncols; c++) {
        for (int r = 0; r < PTQTP_PANEL_ROWS; r++) {
            float sum = add ? y[c][r] : 0;
            for (int64_t t = 0; t < ntiles; t++) {
                const uint8_t * u = codes + t * PTQTP_CODES_SIZE + r * PTQTP_UNIT;
                int32_t a = acts[c][t].bias;
                for (int k = 0; k < PTQTP_UNIT; k++) {
                    a += u[k] * acts[c][t].q[k];
                }
                sum += scales[t * PTQTP_PANEL_ROWS + r] * acts[c][t].d * (float) a;
            }
            y[c][r] = sum;
        }
    }
}

static void gemv_any_scalar(int layout, int64_t n, int64_t npanels, const void * panels, const void * acts, float * y) {
    const uint8_t * tile = panels;
    const ptqtp_act * a = acts;
    const int64_t size = layout == PTQTP_LAYOUT_WIDE ? PTQTP_WIDE_TILE_SIZE : PTQTP_TILE_SIZE;
    for (int64_t p = 0; p < npanels; p++, y += PTQTP_PANEL_ROWS) {
        for (int64_t t = 0; t < n / PTQTP_UNIT; t++, tile += size) {
            uint8_t codes[PTQTP_CODES_SIZE];
            float scales[PTQTP_PANEL_ROWS];
            const ptqtp_act * const one = a + t;
            ptqtp_panel_scalar.layout[layout].unpack(1, tile, codes, scales);
            gemm_scalar(1, codes, scales, 1, &one, &y, t > 0);
        }
    }
}

static void gemv_scalar(int64_t n, int64_t npanels, const void * panels, const void * acts, float * y) {
    gemv_any_scalar(PTQTP_LAYOUT_TP2_1, n, npanels, panels, acts, y);
}

static void gemv_wide_scalar(int64_t n, int64_t npanels, const void * panels, const void * acts, float * y) {
    gemv_any_scalar(PTQTP_LAYOUT_WIDE, n, npanels, panels, acts, y);
}

static void gemv_tp2_2_scalar(int64_t n, int64_t npanels, const void * panels, const void * acts, float * y) {
    gemv_any_scalar(PTQTP_LAYOUT_TP2_2, n, npanels, panels, acts, y);
}

const struct ptqtp_panel_kernel ptqtp_panel_scalar = {
    .name = "scalar",
    .supported = ptqtp_cpu_scalar,
    .gemm_quantize = quantize_scalar,
    .layout = { { sizeof(ptqtp_act), gemv_quantize_scalar, gemv_scalar, unpack_scalar },
                { sizeof(ptqtp_act), gemv_quantize_scalar, gemv_wide_scalar, unpack_wide_scalar },
                { sizeof(ptqtp_act), gemv_quantize_scalar, gemv_tp2_2_scalar, unpack_tp2_2_scalar } },
    .gemm = gemm_scalar,
    .max_cols = 8,
};

/* ---- choice ---- */

static const struct ptqtp_panel_kernel * const kernels[] = {
#define PTQTP_PANEL_KERNEL(isa) &ptqtp_panel_##isa,
#define PTQTP_KERNEL(isa, type, symbol)
#include "kernels/kernels.inc"
#undef PTQTP_PANEL_KERNEL
#undef PTQTP_KERNEL
};

const struct ptqtp_panel_kernel * const * ptqtp_panel_kernels(int * count) {
    *count = (int) (sizeof kernels / sizeof kernels[0]);
    return kernels;
}

const struct ptqtp_panel_kernel * ptqtp_panel_kernel_chosen(void) {
    /* Racing threads compute the same answer and store the same pointer. */
    static const struct ptqtp_panel_kernel * chosen;
    const struct ptqtp_panel_kernel * found = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
    if (!found) {
        const char * forced = getenv("PTQTP_KERNEL");
        for (size_t i = 0; i < sizeof kernels / sizeof kernels[0] && !found; i++) {
            if (kernels[i]->supported() && (!forced || !*forced || strcmp(forced, kernels[i]->name) == 0)) {
                found = kernels[i];
            }
        }
        __atomic_store_n(&chosen, found, __ATOMIC_RELAXED);
    }
    return found;
}

const char * ptqtp_panel_kernel_name(const struct ptqtp_panel_kernel * k) {
    return k->name;
}

bool ptqtp_panel_kernel_supported(const struct ptqtp_panel_kernel * k) {
    return k->supported();
}

size_t ptqtp_gemv_act_size(const struct ptqtp_panel_kernel * k, int type, int form) {
    return k->layout[ptqtp_layout(type, form)].gemv_act_size;
}

void ptqtp_gemv_quantize(const struct ptqtp_panel_kernel * k, int type, int form, const float * x, void * acts,
                         int64_t n) {
    k->layout[ptqtp_layout(type, form)].gemv_quantize(x, acts, n);
}

void ptqtp_gemm_quantize(const struct ptqtp_panel_kernel * k, const float * x, ptqtp_act * acts, int64_t n) {
    k->gemm_quantize(x, acts, n);
}

/* ---- loops over panels ---- */

void ptqtp_gemv(const struct ptqtp_panel_kernel * k, int type, int form, int64_t n, int64_t nrows, const void * panels,
                int64_t panel0, int64_t panel1, const void * acts, float * y) {
    const int layout = ptqtp_layout(type, form);
    const int64_t panel_size = n / PTQTP_UNIT * ptqtp_tile_size(form);
    const uint8_t * src = (const uint8_t *) panels + panel0 * panel_size;
    const int64_t whole = nrows / PTQTP_PANEL_ROWS < panel1 ? nrows / PTQTP_PANEL_ROWS : panel1;
    if (whole > panel0) {
        k->layout[layout].gemv(n, whole - panel0, src, acts, y + panel0 * PTQTP_PANEL_ROWS);
    }
    if (whole < panel1 && whole >= panel0) { /* the matrix' last panel, partly filled */
        float last[PTQTP_PANEL_ROWS];
        k->layout[layout].gemv(n, 1, src + (whole - panel0) * panel_size, acts, last);
        memcpy(y + whole * PTQTP_PANEL_ROWS, last, (size_t) (nrows - whole * PTQTP_PANEL_ROWS) * sizeof(float));
    }
}

enum {
    BLOCK_PANELS = PTQTP_BLOCK_PANELS,
    BLOCK_TILES = PTQTP_BLOCK_TILES,
    MAX_COLS = 32,
};
PTQTP_STATIC_ASSERT(PTQTP_GEMM_SCRATCH == BLOCK_PANELS * BLOCK_TILES * (PTQTP_CODES_SIZE + 64), "scratch size");

void ptqtp_gemm(const struct ptqtp_panel_kernel * k, int type, int form, int64_t n, int64_t nrows, const void * panels,
                int64_t panel0, int64_t panel1, int64_t ncols, const ptqtp_act * const * acts, float * const * y,
                void * scratch) {
    const int64_t rest = ncols % 16;
    if (k->few && rest && rest <= PTQTP_FEW_COLS) {
        ncols -= rest;
        ptqtp_gemm(k->few, type, form, n, nrows, panels, panel0, panel1, rest, acts + ncols, y + ncols, scratch);
        if (!ncols) {
            return;
        }
    }
    const int layout = ptqtp_layout(type, form);
    const int64_t all_tiles = n / PTQTP_UNIT;
    uint8_t * codes = scratch;
    float * scales = (float *) (codes + BLOCK_PANELS * BLOCK_TILES * PTQTP_CODES_SIZE);
    for (int64_t p0 = panel0; p0 < panel1; p0 += BLOCK_PANELS) {
        const int64_t np = panel1 - p0 < BLOCK_PANELS ? panel1 - p0 : BLOCK_PANELS;
        for (int64_t t0 = 0; t0 < all_tiles; t0 += BLOCK_TILES) {
            const int64_t nt = all_tiles - t0 < BLOCK_TILES ? all_tiles - t0 : BLOCK_TILES;
            for (int64_t p = 0; p < np; p++) {
                const uint8_t * tiles = (const uint8_t *) panels + ((p0 + p) * all_tiles + t0) * ptqtp_tile_size(form);
                k->layout[layout].unpack(nt, tiles, codes + p * BLOCK_TILES * PTQTP_CODES_SIZE,
                                         scales + p * BLOCK_TILES * PTQTP_PANEL_ROWS);
            }
            for (int64_t c0 = 0; c0 < ncols; c0 += k->max_cols) {
                const int nc = ncols - c0 < k->max_cols ? (int) (ncols - c0) : k->max_cols;
                const ptqtp_act * a[MAX_COLS];
                for (int c = 0; c < nc; c++) {
                    a[c] = acts[c0 + c] + t0;
                }
                if (k->gemm_block) {
                    const int64_t row = p0 * PTQTP_PANEL_ROWS, rows = np * PTQTP_PANEL_ROWS;
                    float * out[MAX_COLS];
                    for (int c = 0; c < nc; c++) {
                        out[c] = y[c0 + c] + row;
                    }
                    k->gemm_block(nt, nrows - row < rows ? nrows - row : rows, codes, scales, nc, a, out, t0 > 0);
                    continue;
                }
                for (int64_t p = 0; p < np; p++) {
                    const int64_t row = (p0 + p) * PTQTP_PANEL_ROWS;
                    const int64_t rows = nrows - row < PTQTP_PANEL_ROWS ? nrows - row : PTQTP_PANEL_ROWS;
                    float last[MAX_COLS][PTQTP_PANEL_ROWS], *out[MAX_COLS];
                    for (int c = 0; c < nc; c++) {
                        out[c] = y[c0 + c] + row;
                        if (rows < PTQTP_PANEL_ROWS) { /* partly filled: through a buffer */
                            memset(last[c], 0, sizeof last[c]);
                            if (t0 > 0) {
                                memcpy(last[c], out[c], (size_t) rows * sizeof(float));
                            }
                            out[c] = last[c];
                        }
                    }
                    k->gemm(nt, codes + p * BLOCK_TILES * PTQTP_CODES_SIZE, scales + p * BLOCK_TILES * PTQTP_PANEL_ROWS,
                            nc, a, out, t0 > 0);
                    if (rows < PTQTP_PANEL_ROWS) {
                        for (int c = 0; c < nc; c++) {
                            memcpy(y[c0 + c] + row, last[c], (size_t) rows * sizeof(float));
                        }
                    }
                }
            }
        }
    }
}
