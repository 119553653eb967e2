// Attention's two products by bf16 dot products (AVX512_BF16): a multiply-add takes a pair of neighbours along the sum
// at once, twice the float32 rate.  Keys are paired along the head dimension, values along the keys; queries lie in
// pairs as they come, weights are rounded to bf16 (FlashAttention does as well), sums are float32.

#pragma once

#include "vector.h"

#ifdef __AVX512BF16__

namespace refdesk::pairs {

// Two rows of 16 side by side as 16 pairs
inline __m512i paired(__m512i rows) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), rows);
}

// A block of keys [D][16] as pairs [D/2][16]
template <int D>
inline void pair_keys(const bf16* keys, __m512i* to) {
#pragma GCC unroll 8
    for (int d = 0; d < D / 2; d++) to[d] = paired(_mm512_loadu_si512(keys + d * 32));
}

// The first `valid` values of a block [16][D] as pairs of rows [8][D/16][16], the partner of the last one may be zero
template <int D>
inline void pair_values(const bf16* values, int valid, __m512i* to) {
    for (int j = 0; j < valid; j += 2)
#pragma GCC unroll 8
        for (int c = 0; c < D / 16; c++) {
            const bf16* at = values + j * D + c * 16;
            __m256i second = _mm256_setzero_si256();
            if (j + 1 < valid) second = _mm256_loadu_si256((const __m256i*)(at + D));
            const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)at));
            to[j / 2 * (D / 16) + c] = paired(_mm512_inserti64x4(first, second, 1));
        }
}

inline __m512 dot(__m512 sum, __m512i a, uint32_t b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32((int)b));
}

// scores[r][0:C*16] for R queries [D/2] and C blocks of paired keys; rows of scores are `stride` apart
template <int R, int C, int D>
inline void score(const uint32_t* query, const __m512i* keys, float* scores, int stride) {
    __m512 sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
    for (int d = 0; d < D / 2; d++) {
        __m512i key[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) key[c] = keys[c * (D / 2) + d];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[r][c] = dot(sum[r][c], key[c], query[r * (D / 2) + d]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) _mm512_storeu_ps(scores + r * stride + c * 16, sum[r][c]);
}

// out[r][0:W*16] += weights [pairs] of R rows, `stride` pairs apart, times paired values [pairs][D/16]
template <int R, int W, int D>
inline void weigh(const uint32_t* weights, int stride, const __m512i* values, int pairs, float* out) {
    __m512 sum[R][W];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) sum[r][w] = _mm512_loadu_ps(out + r * D + w * 16);
    for (int j = 0; j < pairs; j++) {
        __m512i value[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) value[w] = values[j * (D / 16) + w];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) sum[r][w] = dot(sum[r][w], value[w], weights[r * stride + j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) _mm512_storeu_ps(out + r * D + w * 16, sum[r][w]);
}

template <int R, int D>
inline void score_rows(const uint32_t* query, const __m512i* keys, int blocks, float* scores, int stride) {
    int b = 0;
    for (; b + 4 <= blocks; b += 4) score<R, 4, D>(query, keys + b * (D / 2), scores + b * 16, stride);
    for (; b < blocks; b++) score<R, 1, D>(query, keys + b * (D / 2), scores + b * 16, stride);
}

template <int R, int D>
inline void weigh_rows(const uint32_t* weights, int stride, const __m512i* values, int pairs, float* out) {
    constexpr int W = D % 64 == 0 ? 4 : D % 32 == 0 ? 2 : 1;
    for (int c = 0; c < D / 16; c += W) weigh<R, W, D>(weights, stride, values + c, pairs, out + c * 16);
}

}  // namespace refdesk::pairs

#endif
