// What stands between the matrix products of a decoder layer, each in one pass over its rows: residual + RMSNorm, rotary
// embedding + write into the paged cache, SiLU·mul, and rounding rows to int8.  Arithmetic in float32, one rounding at
// the end.  Plain C ABI; rows are shared between threads where there is enough to do.

#include "vector.h"

using namespace refdesk;

namespace {

constexpr int BS = 16;                  // tokens per block
constexpr int64_t WORTH_A_TEAM = 8192;  // elements; waking the other threads takes a few microseconds

// hidden += delta (unless null), rounded as a tensor of its type would be; out = hidden / rms(hidden) * weight
template <typename T>
void add_rms_norm(T* hidden, const T* delta, const T* weight, T* out, int rows, int width, float eps) {
#pragma omp parallel for schedule(static) if ((int64_t)rows * width > WORTH_A_TEAM)
    for (int r = 0; r < rows; r++) {
        T* h = hidden + (int64_t)r * width;
        vec squares = {};
        for (int i = 0; i < width; i += 16) {
            vec x = load16(h + i);
            if (delta) {
                store16(h + i, x + load16(delta + (int64_t)r * width + i));
                x = load16(h + i);
            }
            squares += x * x;
        }
        const float scale = 1.0f / std::sqrt(hsum(squares) / width + eps);
        for (int i = 0; i < width; i += 16)
            store16(out + (int64_t)r * width + i, load16(h + i) * scale * load16(weight + i));
    }
}

// out[r][i] = silu(x[r][i]) * x[r][width + i]
template <typename T>
void silu_mul(const T* x, T* out, int rows, int width) {
#pragma omp parallel for schedule(static) if ((int64_t)rows * width > WORTH_A_TEAM)
    for (int r = 0; r < rows; r++) {
        const T* gate = x + (int64_t)r * 2 * width;
        for (int i = 0; i < width; i += 16) {
            const vec g = load16(gate + i), up = load16(gate + width + i);
            const vec e = vexp(g < 0 ? g : -g);
            const vec sigmoid = (g < 0 ? e : splat(1.0f)) / (e + 1.0f);
            store16(out + (int64_t)r * width + i, g * sigmoid * up);
        }
    }
}

// out = x * cos + (halves of x swapped) * sin, the sign folded into sin
template <typename T, typename Put>
inline void rotate(const T* x, const T* cos, const T* sin, int dim, Put put) {
    const int half = dim / 2;
    for (int i = 0; i < half; i += 16) {
        const vec a = load16(x + i), b = load16(x + half + i);
        put(i, a * load16(cos + i) + b * load16(sin + i));
        put(half + i, b * load16(cos + half + i) + a * load16(sin + half + i));
    }
}

template <typename T>
void rotate_and_store(const T* query, const T* key, const T* value, T* out, T* keys, T* values, const T* cos,
                      const T* sin, const int64_t* positions, const int64_t* slots, int tokens, int heads,
                      int kv_heads, int dim, int64_t query_stride, int64_t key_stride, int64_t value_stride) {
#pragma omp parallel for schedule(static) if ((int64_t)tokens * heads * dim > WORTH_A_TEAM)
    for (int t = 0; t < tokens; t++) {
        const T* c = cos + positions[t] * dim;
        const T* s = sin + positions[t] * dim;
        for (int h = 0; h < heads; h++) {
            T* to = out + ((int64_t)t * heads + h) * dim;
            rotate(query + t * query_stride + h * dim, c, s, dim, [&](int i, vec x) { store16(to + i, x); });
        }
        const int64_t block = slots[t] / BS, offset = slots[t] % BS;
        for (int h = 0; h < kv_heads; h++) {
            T* to = keys + (block * kv_heads + h) * dim * BS + offset;
            rotate(key + t * key_stride + h * dim, c, s, dim, [&](int i, vec x) {
                T row[16];
                store16(row, x);
                for (int d = 0; d < 16; d++) to[(i + d) * BS] = row[d];
            });
            std::memcpy(values + ((block * kv_heads + h) * BS + offset) * dim, value + t * value_stride + h * dim,
                        dim * sizeof(T));
        }
    }
}

// A scale for each row, and its elements in units of it, as unsigned bytes around 128
template <typename T>
void quantize_rows(const T* x, uint8_t* out, float* scales, int rows, int width) {
#pragma omp parallel for schedule(static) if ((int64_t)rows * width > WORTH_A_TEAM)
    for (int r = 0; r < rows; r++) {
        const T* row = x + (int64_t)r * width;
        vec most = {};
        ivec broken = {};  // a comparison loses NaN, and the row must not look sound
        for (int i = 0; i < width; i += 16) {
            const vec v = load16(row + i);
            most = max(most, max(v, -v));
            broken |= v != v;
        }
        const float scale = hmax((vec)(broken & 0x3F800000)) > 0 ? NAN : std::fmax(hmax(most) / 127.0f, 1e-12f);
        scales[r] = scale;
        const vec magic = splat(12582912.0f + 128.0f);  // rounds half to even in the low mantissa bits, as torch does
        for (int i = 0; i < width; i += 16) {
            const ivec units = (ivec)(load16(row + i) / scale + magic) & 0xFF;
            typedef uint8_t bytes __attribute__((vector_size(16)));
            const bytes narrow = __builtin_convertvector(units, bytes);
            std::memcpy(out + (int64_t)r * width + i, &narrow, 16);
        }
    }
}

// out[r][i] = x[r][i] * scales[r] + bias[i]
template <typename T>
void scale_rows(const float* x, const float* scales, const float* bias, T* out, int rows, int width) {
#pragma omp parallel for schedule(static) if ((int64_t)rows * width > WORTH_A_TEAM)
    for (int r = 0; r < rows; r++) {
        const int64_t at = (int64_t)r * width;
        for (int i = 0; i < width; i += 16) {
            const vec y = load16(x + at + i) * scales[r];
            store16(out + at + i, bias ? y + load16(bias + i) : y);
        }
    }
}

}  // namespace

extern "C" {

void refdesk_add_rms_norm(int is_bf16, void* hidden, const void* delta, const void* weight, void* out, int rows,
                          int width, float eps) {
    if (is_bf16)
        add_rms_norm((bf16*)hidden, (const bf16*)delta, (const bf16*)weight, (bf16*)out, rows, width, eps);
    else
        add_rms_norm((float*)hidden, (const float*)delta, (const float*)weight, (float*)out, rows, width, eps);
}

void refdesk_silu_mul(int is_bf16, const void* x, void* out, int rows, int width) {
    if (is_bf16)
        silu_mul((const bf16*)x, (bf16*)out, rows, width);
    else
        silu_mul((const float*)x, (float*)out, rows, width);
}

void refdesk_rotate_and_store(int is_bf16, const void* query, const void* key, const void* value, void* out, void* keys,
                              void* values, const void* cos, const void* sin, const int64_t* positions,
                              const int64_t* slots, int tokens, int heads, int kv_heads, int dim, int64_t query_stride,
                              int64_t key_stride, int64_t value_stride) {
    if (is_bf16)
        rotate_and_store((const bf16*)query, (const bf16*)key, (const bf16*)value, (bf16*)out, (bf16*)keys,
                         (bf16*)values, (const bf16*)cos, (const bf16*)sin, positions, slots, tokens, heads, kv_heads,
                         dim, query_stride, key_stride, value_stride);
    else
        rotate_and_store((const float*)query, (const float*)key, (const float*)value, (float*)out, (float*)keys,
                         (float*)values, (const float*)cos, (const float*)sin, positions, slots, tokens, heads,
                         kv_heads, dim, query_stride, key_stride, value_stride);
}

void refdesk_quantize_rows(int is_bf16, const void* x, uint8_t* out, float* scales, int rows, int width) {
    if (is_bf16)
        quantize_rows((const bf16*)x, out, scales, rows, width);
    else
        quantize_rows((const float*)x, out, scales, rows, width);
}

void refdesk_scale_rows(int is_bf16, const float* x, const float* scales, const float* bias, void* out, int rows,
                        int width) {
    if (is_bf16)
        scale_rows(x, scales, bias, (bf16*)out, rows, width);
    else
        scale_rows(x, scales, bias, (float*)out, rows, width);
}
}
