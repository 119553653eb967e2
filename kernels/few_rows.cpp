// y = x W^T in bf16 for few rows, where reading the weights once is most of the work (a decode step): AVX512-BF16's dot
// products over weights laid out in the order they are read.  Each output is one sum in the order of k whatever the
// number of rows, so a row's result doesn't depend on its batch.

#include "vector.h"

#include <vector>

namespace {

constexpr int LANES = 16;     // outputs side by side in a register
constexpr int SHARE = 12;     // registers of outputs that a thread takes at a time
constexpr int MAX_ROWS = 16;

#ifdef __AVX512BF16__

// C registers of outputs for R rows.  weights: [C][K/2][LANES][2]; x: [K/2][R] pairs; out: rows of `outputs`
template <int R, int C>
inline void tile(const uint16_t* weights, const int32_t* x, int pairs, uint16_t* out, int64_t outputs) {
    __m512 sum[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
        __m512bh w[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
            w[c] = (__m512bh)_mm512_loadu_si512(weights + ((int64_t)c * pairs + k) * 2 * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(x[k * R + r]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], w[c], pair);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
            _mm256_storeu_si256((__m256i*)(out + r * outputs + c * LANES), (__m256i)_mm512_cvtneps_pbh(sum[r][c]));
}

template <int R, int C = (R <= 4 ? 4 : R <= 8 ? 2 : 1)>
void multiply(const uint16_t* weights, const uint16_t* x, uint16_t* out, int inputs, int outputs) {
    static thread_local std::vector<int32_t> pairs_of_rows;
    const int pairs = inputs / 2, registers = outputs / LANES, shares = (registers + SHARE - 1) / SHARE;
    pairs_of_rows.resize((size_t)pairs * R);
    int32_t* packed = pairs_of_rows.data();
    for (int r = 0; r < R; r++)
        for (int k = 0; k < pairs; k++) std::memcpy(packed + k * R + r, x + (int64_t)r * inputs + 2 * k, 4);
#pragma omp parallel for schedule(static)
    for (int share = 0; share < shares; share++) {
        const int end = (share + 1) * SHARE < registers ? (share + 1) * SHARE : registers;
        int at = share * SHARE;
        for (; at + C <= end; at += C)
            tile<R, C>(weights + (int64_t)at * inputs * LANES, packed, pairs, out + at * LANES, outputs);
        for (; at < end; at++)
            tile<R, 1>(weights + (int64_t)at * inputs * LANES, packed, pairs, out + at * LANES, outputs);
    }
}

template <int R>
void dispatch(int rows, const uint16_t* weights, const uint16_t* x, uint16_t* out, int inputs, int outputs) {
    if (rows == R)
        multiply<R>(weights, x, out, inputs, outputs);
    else if constexpr (R > 1)
        dispatch<R - 1>(rows, weights, x, out, inputs, outputs);
}

#endif

}  // namespace

extern "C" {

int refdesk_multiplies_few_rows() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void refdesk_multiply_few_rows(const void* weights, const void* x, void* out, int rows, int inputs, int outputs) {
#ifdef __AVX512BF16__
    for (int from = 0; from < rows; from += MAX_ROWS)
        dispatch<MAX_ROWS>(rows - from < MAX_ROWS ? rows - from : MAX_ROWS, (const uint16_t*)weights,
                           (const uint16_t*)x + (int64_t)from * inputs, (uint16_t*)out + (int64_t)from * outputs,
                           inputs, outputs);
#endif
}
}
