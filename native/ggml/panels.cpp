// TP2_1 and TP2_2 in ggml-cpu: an extra buffer type, like CPU_REPACK, whose tensors are interleaved to panels when they
// are loaded, and the matrix products on it. A weight lies in memory once: here, or in the plain buffer, row by row.
#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml.h"
#include "ggml/expand.h"
#include "ggml/ggml-ptqtp.h"
#include "traits.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__linux__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif

namespace {

constexpr int64_t UNIT = PTQTP_UNIT;
constexpr int64_t MAX_COLS = 256; // columns of a piece of work
constexpr size_t ALIGNMENT = 64;

// PTQTP_EXPAND: 1 = wide panels, 0 = packed ones; else those of TP2_2 are wide where that is faster by much
int form(int type) {
    static const char * expand = getenv("PTQTP_EXPAND");
    if (expand && *expand) {
        return strcmp(expand, "0") != 0 ? PTQTP_WIDE : PTQTP_PACKED;
    }
    if (type != PTQTP_TP2_2) {
        return PTQTP_PACKED;
    }
    static const bool pays = ptqtp_expansion_pays(ptqtp_panel_kernel_chosen());
    return pays ? PTQTP_WIDE : PTQTP_PACKED;
}

size_t aligned(size_t n) {
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

char * aligned(char * p) {
    return (char *) aligned((size_t) (uintptr_t) p);
}

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// One product of a matrix with columns; all threads of the pool work on it.
struct product {
    const ptqtp_panel_kernel * kernel;
    int type, form;
    int64_t n, nrows;
    const void * panels;

    product(const ggml_tensor * matrix, const void * panels)
        : kernel(ptqtp_panel_kernel_chosen()), type(matrix->type), form(::form(matrix->type)), n(matrix->ne[0]),
          nrows(matrix->ne[1]), panels(panels) {}
};

// ---- the pieces of work of a product: panels x columns ----

struct pieces {
    int64_t npanels, ncols, panel_step, col_step, panel_steps, col_steps;

    pieces(int64_t nrows, int64_t ncols, int nth)
        : npanels(ceil_div(nrows, PTQTP_PANEL_ROWS)), ncols(ncols), col_step(std::min(ncols, MAX_COLS)) {
        col_steps = ceil_div(ncols, col_step);
        // four pieces a thread, so that a slow thread does not hold up the others; one where they would be tiny
        const int64_t per_thread = npanels * col_steps >= 32 * nth ? 4 : 1;
        panel_step = std::max<int64_t>(1, ceil_div(npanels * col_steps, per_thread * nth));
        if (ncols > 1) {
            panel_step = std::min<int64_t>(panel_step, 8); // what ptqtp_gemm unpacks at a time
        }
        panel_steps = ceil_div(npanels, panel_step);
    }

    int64_t count() const {
        return panel_steps * col_steps;
    }
};

// acts(c), out(c): where column c's activations lie, and where its results go
template <typename Acts, typename Out>
void run_piece(const product & p, const pieces & work, int64_t index, void * scratch, Acts acts, Out out) {
    const int64_t panel0 = index % work.panel_steps * work.panel_step;
    const int64_t panel1 = std::min(panel0 + work.panel_step, work.npanels);
    const int64_t col0 = index / work.panel_steps * work.col_step;
    const int64_t ncols = std::min(work.col_step, work.ncols - col0);
    const ptqtp_act * act_of[MAX_COLS];
    float * out_of[MAX_COLS];
    for (int64_t c = 0; c < ncols; c++) {
        act_of[c] = acts(col0 + c);
        out_of[c] = out(col0 + c);
    }
    ptqtp_gemm(p.kernel, p.type, p.form, p.n, p.nrows, p.panels, panel0, panel1, ncols, act_of, out_of, scratch);
}

size_t act_bytes(int type, int64_t n, int64_t ncols) {
    const size_t gemv = (size_t) (n / UNIT) * ptqtp_gemv_act_size(ptqtp_panel_kernel_chosen(), type, form(type));
    const size_t gemm = (size_t) (n / UNIT) * sizeof(ptqtp_act) * (size_t) ncols;
    return aligned(std::max(gemv, gemm));
}

// Quantizes this thread's share of the columns of src1: whole columns, or where there are few, a part of each.
template <typename Column>
void quantize_columns(const ggml_compute_params * params, const product & p, int64_t ncols, bool one, Column column) {
    const int64_t nb = p.n / UNIT;
    const size_t act_size = one ? ptqtp_gemv_act_size(p.kernel, p.type, p.form) : sizeof(ptqtp_act);
    const bool whole = ncols >= 4 * params->nth;
    const int64_t b0 = whole ? 0 : nb * params->ith / params->nth;
    const int64_t b1 = whole ? nb : nb * (params->ith + 1) / params->nth;
    for (int64_t c = whole ? params->ith : 0; c < ncols; c += whole ? params->nth : 1) {
        const float * x = column(c) + b0 * UNIT;
        char * dst = (char *) params->wdata + (size_t) (c * nb + b0) * act_size;
        if (one) {
            ptqtp_gemv_quantize(p.kernel, p.type, p.form, x, dst, (b1 - b0) * UNIT);
        } else {
            ptqtp_gemm_quantize(p.kernel, x, (ptqtp_act *) dst, (b1 - b0) * UNIT);
        }
    }
}

class panel_traits : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        const ggml_tensor * src1 = op->src[1];
        const int64_t ncols = ggml_nrows(src1);
        size = act_bytes(op->src[0]->type, src1->ne[0], ncols) + (size_t) n_threads * PTQTP_GEMM_SCRATCH + ALIGNMENT;
        if (op->op == GGML_OP_MUL_MAT_ID) {
            size += aligned(sizeof(int64_t) * (size_t) (op->src[0]->ne[2] + 1));
            size += sizeof(int64_t) * (size_t) ggml_nelements(op->src[2]);
        }
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (op->op == GGML_OP_MUL_MAT) {
            mul_mat(params, op);
        } else {
            mul_mat_id(params, op);
        }
        return true;
    }

    static void mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
        const ggml_tensor * src0 = dst->src[0];
        const ggml_tensor * src1 = dst->src[1];
        const product p(src0, src0->data);
        const int64_t ne11 = src1->ne[1], ne12 = src1->ne[2];
        const int64_t ncols = ggml_nrows(src1);
        const bool one = ncols == 1;
        const int64_t nb = p.n / UNIT;

        quantize_columns(params, p, ncols, one, [&](int64_t c) {
            const int64_t i1 = c % ne11, i2 = c / ne11 % ne12, i3 = c / ne11 / ne12;
            return (const float *) ((const char *) src1->data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3]);
        });
        const pieces work(p.nrows, ncols, params->nth);
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);

        const auto * acts = (const ptqtp_act *) params->wdata;
        char * scratch =
            aligned((char *) params->wdata + act_bytes(p.type, p.n, ncols)) + (size_t) params->ith * PTQTP_GEMM_SCRATCH;
        for (int64_t i = params->ith; i < work.count(); i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            if (one) {
                const int64_t panel0 = i * work.panel_step;
                ptqtp_gemv(p.kernel, p.type, p.form, p.n, p.nrows, p.panels, panel0,
                           std::min(panel0 + work.panel_step, work.npanels), acts, (float *) dst->data);
            } else {
                run_piece(
                    p, work, i, scratch, [&](int64_t c) { return acts + c * nb; },
                    [&](int64_t c) {
                        const int64_t i1 = c % ne11, i2 = c / ne11 % ne12, i3 = c / ne11 / ne12;
                        return (float *) ((char *) dst->data + i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3]);
                    });
            }
        }
    }

    // Each column of src1 goes through the experts that ids names for it.
    static void mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst) {
        const ggml_tensor * src0 = dst->src[0];
        const ggml_tensor * src1 = dst->src[1];
        const ggml_tensor * ids = dst->src[2];
        product p(src0, nullptr);
        const int64_t nexperts = src0->ne[2], nused = ids->ne[0], ntokens = ids->ne[1];
        const int64_t ne11 = src1->ne[1], ncols = ggml_nrows(src1);
        const int64_t nb = p.n / UNIT;
        const size_t expert_size = ptqtp_panels_size(p.form, p.nrows, p.n);
        const bool one = ncols == 1; // one token, and the experts share its activations

        char * scratch_base = aligned((char *) params->wdata + act_bytes(p.type, p.n, ncols));
        char * scratch = scratch_base + (size_t) params->ith * PTQTP_GEMM_SCRATCH;
        // uses[first[e]] .. uses[first[e+1]-1]: (slot, token) of the columns that go through expert e
        auto * first = (int64_t *) (scratch_base + (size_t) params->nth * PTQTP_GEMM_SCRATCH);
        struct use {
            int32_t slot, token;
        };
        auto * uses = (use *) ((char *) first + aligned(sizeof(int64_t) * (size_t) (nexperts + 1)));

        quantize_columns(params, p, ncols, one, [&](int64_t c) {
            return (const float *) ((const char *) src1->data + c % ne11 * src1->nb[1] + c / ne11 * src1->nb[2]);
        });
        if (params->ith == 0) {
            const auto expert_of = [&](int64_t slot, int64_t token) {
                const int32_t e =
                    *(const int32_t *) ((const char *) ids->data + token * ids->nb[1] + slot * ids->nb[0]);
                GGML_ASSERT(e >= 0 && e < nexperts);
                return e;
            };
            std::fill(first, first + nexperts + 1, 0);
            for (int64_t token = 0; token < ntokens; token++) {
                for (int64_t slot = 0; slot < nused; slot++) {
                    first[expert_of(slot, token)]++;
                }
            }
            for (int64_t e = 0, sum = 0; e <= nexperts; e++) {
                sum += std::exchange(first[e], sum);
            }
            for (int64_t token = 0; token < ntokens; token++) {
                for (int64_t slot = 0; slot < nused; slot++) {
                    uses[first[expert_of(slot, token)]++] = { (int32_t) slot, (int32_t) token };
                }
            }
            std::copy_backward(first, first + nexperts, first + nexperts + 1);
            first[0] = 0;
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);

        const auto * acts = (const ptqtp_act *) params->wdata;
        int64_t next = params->ith, base = 0; // this thread's next piece; pieces of the experts before
        for (int64_t e = 0; e < nexperts; e++) {
            const use * use_of = uses + first[e];
            const int64_t count = first[e + 1] - first[e];
            if (count == 0) {
                continue;
            }
            const pieces work(p.nrows, count, params->nth);
            p.panels = (const char *) src0->data + (size_t) e * expert_size;
            const auto out = [&](int64_t c) {
                return (float *) ((char *) dst->data + use_of[c].slot * dst->nb[1] + use_of[c].token * dst->nb[2]);
            };
            while (next < base + work.count()) {
                const int64_t i = next - base;
                if (one) {
                    const int64_t panel0 = i % work.panel_steps * work.panel_step;
                    const int64_t panel1 = std::min(panel0 + work.panel_step, work.npanels);
                    for (int64_t c = i / work.panel_steps * work.col_step;
                         c < std::min(count, (i / work.panel_steps + 1) * work.col_step); c++) {
                        ptqtp_gemv(p.kernel, p.type, p.form, p.n, p.nrows, p.panels, panel0, panel1, acts, out(c));
                    }
                } else {
                    run_piece(
                        p, work, i, scratch,
                        [&](int64_t c) { return acts + (use_of[c].slot % ne11 + use_of[c].token * ne11) * nb; }, out);
                }
                next = ggml_threadpool_chunk_add(params->threadpool, 1);
            }
            base += work.count();
        }
    }
};

panel_traits traits;

// ---- the buffer type ----

// Whether this buffer type holds a tensor as panels; one of another type lies in it as it is.
bool in_panels(const ggml_tensor * t) {
    const ptqtp_type_traits * type = ptqtp_traits(t->type);
    return type && type->panels;
}

ggml_status init_tensor(ggml_backend_buffer_t, ggml_tensor * tensor) {
    tensor->extra = in_panels(tensor) ? &traits : nullptr;
    return GGML_STATUS_SUCCESS;
}

template <typename Fn> void for_each_matrix(const ggml_tensor * t, Fn fn) {
    const size_t rows_size = (size_t) t->ne[1] * ggml_row_size(t->type, t->ne[0]);
    const size_t panels_size = ptqtp_panels_size(form(t->type), t->ne[1], t->ne[0]);
    for (int64_t i = 0; i < t->ne[2] * t->ne[3]; i++) {
        fn((char *) t->data + (size_t) i * panels_size, (size_t) i * rows_size);
    }
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(in_panels(t) && offset == 0 && size == ggml_nbytes(t));
    for_each_matrix(t, [&](char * panels, size_t at) {
        ptqtp_panels_from_rows(t->type, form(t->type), (const char *) data + at, panels, 0, t->ne[1], t->ne[0]);
    });
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    GGML_ASSERT(in_panels(t) && offset == 0 && size == ggml_nbytes(t));
    for_each_matrix(t, [&](const char * panels, size_t at) {
        ptqtp_rows_from_panels(t->type, form(t->type), panels, (char *) data + at, 0, t->ne[1], t->ne[0]);
    });
}

const char * get_name(ggml_backend_buffer_type_t) {
    return form(PTQTP_TP2_1) == PTQTP_WIDE ? "CPU_PTQTP_WIDE" : "CPU_PTQTP";
}

// A token reads every page of the weights once: with small pages that is a miss of the address cache each.
void ask_for_huge_pages(void * data, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), begin = ((size_t) data + page - 1) / page * page;
    const size_t end = ((size_t) data + size) / page * page;
    if (end > begin) {
        (void) madvise((void *) begin, end - begin, MADV_HUGEPAGE); // advice: no is an answer
    }
#else
    (void) data, (void) size;
#endif
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        ask_for_huge_pages(ggml_backend_buffer_get_base(buffer), size);
        buffer->buft = buft;
        buffer->iface.init_tensor = init_tensor;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = get_tensor;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return ALIGNMENT;
}

size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    if (!in_panels(t)) {
        return ggml_nbytes(t);
    }
    return ptqtp_panels_size(form(t->type), t->ne[1], t->ne[0]) * (size_t) (t->ne[2] * t->ne[3]);
}

class panel_buffer_type : public ggml::cpu::extra_buffer_type {
    static bool is_ours(const ggml_tensor * t) {
        return t && t->buffer && t->buffer->buft == ggml_backend_cpu_ptqtp_buffer_type();
    }

    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor *src0 = op->src[0], *src1 = op->src[1];
        if (!is_ours(src0) || !in_panels(src0) || !ggml_is_contiguous(src0) || src0->view_src) {
            return false;
        }
        if (!src1 || src1->type != GGML_TYPE_F32 || src1->nb[0] != sizeof(float) ||
            (src1->buffer && !ggml_backend_buft_is_host(src1->buffer->buft))) {
            return false;
        }
        if (op->op == GGML_OP_MUL_MAT) {
            return src0->ne[2] * src0->ne[3] == 1;
        }
        return op->op == GGML_OP_MUL_MAT_ID && src0->ne[3] == 1;
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if ((op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID) && is_ours(op->src[0])) {
            return (ggml::cpu::tensor_traits *) op->src[0]->extra;
        }
        return nullptr;
    }
};

} // namespace

ggml_backend_buffer_type_t ggml_backend_cpu_ptqtp_buffer_type(void) {
    static ggml_backend_buffer_type type = {
        /* .iface   = */ { get_name, alloc_buffer, get_alignment, /* .get_max_size = */ nullptr, get_alloc_size,
                           /* .is_host = */ nullptr },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ new panel_buffer_type(),
    };
    return ptqtp_panel_kernel_chosen() ? &type : nullptr;
}
