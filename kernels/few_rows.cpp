// y = x W^T in bf16 for few rows, where reading the weights once is most of the work (a decode step).  The weights lie in
// the order they are read and are widened to float32 on the way: two float32 multiply-adds a cycle beat the processor's
// bf16 dot products from a few rows on.  Each output is one sum in the order of k whatever the number of rows, so a row's
// result doesn't depend on its batch.

#include "vector.h"

#include <vector>

namespace {

constexpr int LANES = 16;     // outputs side by side in a register
constexpr int SHARE = 12;     // registers of outputs that a thread takes at a time
constexpr int MAX_ROWS = 16;

#ifdef __AVX512BF16__

// C registers of outputs for R rows.  weights: [C][K/2][LANES][2]; x: [K][R]; out: rows of `outputs`
template <int R, int C>
inline void tile(const uint16_t* weights, const float* x, int pairs, uint16_t* out, int64_t outputs) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512 sum[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
        __m512 even[C], odd[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const __m512i both = _mm512_loadu_si512(weights + ((int64_t)c * pairs + k) * 2 * LANES);
            even[c] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            odd[c] = _mm512_castsi512_ps(_mm512_and_si512(both, high));
        }
        const float* at = x + (int64_t)k * 2 * R;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const __m512 value = _mm512_set1_ps(at[r]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[r][c] = _mm512_fmadd_ps(even[c], value, sum[r][c]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const __m512 value = _mm512_set1_ps(at[R + r]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[r][c] = _mm512_fmadd_ps(odd[c], value, sum[r][c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
            _mm256_storeu_si256((__m256i*)(out + r * outputs + c * LANES), (__m256i)_mm512_cvtneps_pbh(sum[r][c]));
}

// x as float32, the rows of a tile side by side for each k
template <int R>
inline void columns_of(const uint16_t* x, int inputs, float* columns) {
    for (int r = 0; r < R; r++)
        for (int k = 0; k < inputs; k++) {
            const uint32_t bits = (uint32_t)x[(int64_t)r * inputs + k] << 16;
            std::memcpy(columns + (int64_t)k * R + r, &bits, 4);
        }
}

// R rows as tiles of R1 and R2 rows, which go over the same weights while they are near
template <int R, int R1 = (R <= 8 ? R : (R + 1) / 2), int R2 = R - R1, int C = (R1 <= 4 ? 4 : 3)>
void multiply(const uint16_t* weights, const uint16_t* x, uint16_t* out, int inputs, int outputs) {
    static thread_local std::vector<float> columns;
    const int pairs = inputs / 2, registers = outputs / LANES, shares = (registers + SHARE - 1) / SHARE;
    columns.resize((size_t)inputs * R);
    float* first = columns.data();
    float* second = first + (size_t)inputs * R1;
    columns_of<R1>(x, inputs, first);
    if constexpr (R2 > 0) columns_of<R2>(x + (int64_t)R1 * inputs, inputs, second);
#pragma omp parallel for schedule(static)
    for (int share = 0; share < shares; share++) {
        const int end = (share + 1) * SHARE < registers ? (share + 1) * SHARE : registers;
        int at = share * SHARE;
        for (; at + C <= end; at += C) {
            const uint16_t* w = weights + (int64_t)at * inputs * LANES;
            tile<R1, C>(w, first, pairs, out + at * LANES, outputs);
            if constexpr (R2 > 0) tile<R2, C>(w, second, pairs, out + (int64_t)R1 * outputs + at * LANES, outputs);
        }
        for (; at < end; at++) {
            const uint16_t* w = weights + (int64_t)at * inputs * LANES;
            tile<R1, 1>(w, first, pairs, out + at * LANES, outputs);
            if constexpr (R2 > 0) tile<R2, 1>(w, second, pairs, out + (int64_t)R1 * outputs + at * LANES, outputs);
        }
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
