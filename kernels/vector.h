// Sixteen floats at a time.  Vectors are GCC's generic ones, so -march=native gives AVX-512 or AVX2 code from the same
// source; intrinsics stand where the compiler makes something slow of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace refdesk {

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };

inline vec load16(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline vec load16(const bf16* p) {
#ifdef __AVX512F__  // GCC 12 widens a generic vector in two halves
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    hvec h; std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
}
inline void store16(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline void store16(bf16* p, vec v) {  // round to nearest even, as torch does
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
    return;
#endif
    uvec w = (uvec)v;
    w = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)w));
#else
    hvec h = __builtin_convertvector(w, hvec);
    std::memcpy(p, &h, sizeof h);
#endif
}
inline vec splat(float x) { return x - vec{}; }

// exp for x <= 0: 2^n * p(r), r in [-ln2/2, ln2/2], degree 6; relative error under 2e-7; exp(-inf) = 0
inline vec vexp(vec x) {
#ifdef __AVX512F__  // the processor rounds to an integer and scales by 2^n, down to zero, in an instruction each
    const __m512 v = (__m512)x;
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), v);
    rest = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.3888889e-3f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3333333e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1666667e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666667e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    // -inf leaves a NaN in `rest`: its place is empty
    return (vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(v, _mm512_set1_ps(-1e30f), _CMP_GT_OQ), sum, whole);
#endif
    const vec low = splat(-87.0f);
    ivec dead = x < low;
    x = dead ? low : x;
    vec z = x * 1.44269504f;
    const vec magic = splat(12582912.0f);               // rounds to an integer in the low mantissa bits
    vec n = (z + magic) - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.3888889e-3f);
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec e = (__builtin_convertvector(n, ivec) + 127) << 23;
    p *= (vec)e;
    return dead ? vec{} : p;
}
inline vec max(vec a, vec b) { return a > b ? a : b; }
inline vec swap(vec v, int by) {
#ifdef __clang__
    vec out;
    for (int i = 0; i < 16; i++) out[i] = v[i ^ by];
    return out;
#else
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(v, lane ^ by);
#endif
}
inline float hmax(vec v) { for (int by = 8; by; by /= 2) v = max(v, swap(v, by)); return v[0]; }
inline float hsum(vec v) { for (int by = 8; by; by /= 2) v += swap(v, by); return v[0]; }

}  // namespace refdesk
