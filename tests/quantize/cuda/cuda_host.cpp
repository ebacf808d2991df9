// kernels.cu on the host.
#include "cuda_host.h"

#include "kernels.cu"

struct Call {
    const u8 * src;
    int type;
    u32 groups;
    u64 first;
    u8 * dst;
    Stats * stats;
    const u64 * moved;
};

static const struct {
    const char * name;
    bool wide;
    void (*run)(const Call &);
} kernels[] = {
    { "search_tp2_2", false, [](const Call & c) { search_tp2_2(c.src, c.type, c.groups, c.first, c.dst, c.stats); } },
    { "search_tp2_1", false, [](const Call & c) { search_tp2_1(c.src, c.type, c.groups, c.first, c.dst, c.stats); } },
    { "q8_0", false, [](const Call & c) { q8_0(c.src, c.type, c.groups, c.first, c.dst, c.stats); } },
    { "search_tp2_0", true, [](const Call & c) { search_tp2_0(c.src, c.type, c.groups, c.first, c.dst, c.stats); } },
    { "paper_tp2_0", true,
      [](const Call & c) { paper_tp2_0(c.src, c.type, c.groups, c.first, c.dst, c.stats, c.moved); } },
    { "probe_paper", true, [](const Call & c) { probe_paper(c.src, c.type, c.groups, c.stats); } },
};

// Returns 0, or 1 for a name that is no kernel.
extern "C" int run(const char * name, const u8 * src, int type, u32 groups, u64 first, u8 * dst, Stats * stats,
                   const u64 * moved) {
    for (const auto & k : kernels) {
        if (strcmp(k.name, name) == 0) {
            const Call c = { src, type, groups, first, dst, stats, moved };
            launch(k.wide ? groups * WIDE_SHARE : groups, [&] { k.run(c); });
            return 0;
        }
    }
    return 1;
}

extern "C" void run_fold(const Stats * in, u32 n, Stats * out, u32 m) {
    launch(m, [&] { fold(in, n, out, m); });
}
