/* What all kernels need: short names of types, and the scale codes of TP2_1 (docs/format.md). */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FLOAT_MAX 3.402823466e+38f

__device__ float scale_value(int code) {
    return __uint_as_float(((u32) code << 19) + (112u << 23));
}

__device__ int scale_code(float s) {
    const u32 smallest = 112u << 23;
    u32 bits = __float_as_uint(s);
    if (!(s > 0) || bits <= smallest) {
        return 0;
    }
    if (bits >= smallest + (255u << 19)) {
        return 255;
    }
    bits -= smallest;
    const u32 low = bits & ((1u << 19) - 1), half = 1u << 18;
    const int code = (int) (bits >> 19);
    return code + (low > half || (low == half && (code & 1)));
}

/* The smaller of best and |e|. */
__device__ float nearer(float best, float e) {
    const float d = fabsf(e);
    return d < best ? d : best;
}
