// Paged attention for CPUs: one flat batch of prefill chunks and decodes, read through block tables.
//
// A work item is a tile of query tokens of one sequence and one KV head.  All query heads of that KV head and all
// tokens of the tile become rows, so each key and value is loaded and widened once for all of them.  Keys are taken
// 64 at a time with an online softmax (Milakov and Gimelshein 2018; FlashAttention).  The stored layout (cache.py)
// makes the scores of 16 keys one vector multiply-add per dimension, without a horizontal sum; where the processor
// multiplies bf16 in pairs, one for two dimensions (pairs.h).
//
// Plain C ABI, no PyTorch headers: pointers and sizes come through ctypes.  Vectors are GCC's generic ones, so
// -march=native gives AVX-512 or AVX2 code from the same source.

#include "pairs.h"
#include "vector.h"

#include <limits>
#include <type_traits>

using namespace refdesk;

namespace {

constexpr int BS = 16;          // tokens per block
constexpr int SPAN = 128;       // keys per softmax round
constexpr int MAX_ROWS = 48;    // query rows per work item
constexpr int FEW_ROWS = 8;     // up to here keys and values are used so seldom that they are not prepared
constexpr int AHEAD = 4;        // blocks between the one worked on and the one asked for

// scores[r][0:16] of one key block for R rows: sum over d of q[r][d] * key[d][0:16].  Few rows keep several sums
// each: a multiply-add waits for the one before it in its sum, so it takes eight sums or more to fill the pipeline.
template <int R, int D, typename S>
inline void score_block(const float* q, const S* key, const S* ahead, float* scores) {
    constexpr int SUMS = R >= 8 ? 1 : 4;
    vec acc[R][SUMS] = {};
    for (int d = 0; d < D; d += SUMS)
#pragma GCC unroll 8
        for (int u = 0; u < SUMS; u++) {
            if (ahead && (d + u) % (64 / (int)sizeof(S) / BS) == 0) __builtin_prefetch(ahead + (d + u) * BS, 0, 2);
            vec k = load16(key + (d + u) * BS);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][u] += q[r * D + d + u] * k;
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int u = 1; u < SUMS; u++) acc[r][0] += acc[r][u];
        store16(scores + r * SPAN, acc[r][0]);
    }
}

// out[r][0:W*16] += sum over j of p[r][j] * value[j][0:W*16], W vectors of the head dimension at a time
template <int R, int D, int W, typename S>
inline void weigh(const float* p, const S* value, const S* ahead, int keys, float* out) {
    vec acc[R][W];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) acc[r][w] = load16(out + r * D + w * 16);
    for (int j = 0; j < keys; j++) {
        if (ahead)
#pragma GCC unroll 8
            for (int w = 0; w < W * 16; w += 64 / (int)sizeof(S)) __builtin_prefetch(ahead + j * D + w, 0, 2);
        vec v[W];
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) v[w] = load16(value + j * D + w * 16);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int w = 0; w < W; w++) acc[r][w] += p[r * SPAN + j] * v[w];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) store16(out + r * D + w * 16, acc[r][w]);
}

template <int D> constexpr int width() { return D % 64 == 0 ? 4 : D % 32 == 0 ? 2 : 1; }

template <int R, int D, typename S>
inline void weigh_all(const float* p, const S* value, const S* ahead, int keys, float* out) {
    constexpr int W = width<D>();
    for (int d = 0; d < D; d += W * 16) weigh<R, D, W>(p, value + d, ahead ? ahead + d : nullptr, keys, out + d);
}

template <int D, typename S>
inline void score_rows(const float* q, const S* key, const S* ahead, float* scores, int rows) {
    int r = 0;
    for (; r + 8 <= rows; r += 8) score_block<8, D>(q + r * D, key, ahead, scores + r * SPAN);
    for (; r + 3 <= rows; r += 3) score_block<3, D>(q + r * D, key, ahead, scores + r * SPAN);
    for (; r < rows; r++) score_block<1, D>(q + r * D, key, ahead, scores + r * SPAN);
}

template <int D, typename S>
inline void weigh_rows(const float* p, const S* value, const S* ahead, int keys, float* out, int rows) {
    int r = 0;
    for (; r + 6 <= rows; r += 6) weigh_all<6, D>(p + r * SPAN, value, ahead, keys, out + r * D);
    for (; r + 3 <= rows; r += 3) weigh_all<3, D>(p + r * SPAN, value, ahead, keys, out + r * D);
    for (; r < rows; r++) weigh_all<1, D>(p + r * SPAN, value, ahead, keys, out + r * D);
}

template <typename T, int D>
struct Item {
    const T* query;             // [tokens, heads, D]
    const T* keys;              // [blocks, kv_heads, D, BS]
    const T* values;            // [blocks, kv_heads, BS, D]
    T* out;                     // [tokens, heads, D]
    const int32_t* table;       // blocks of this sequence
    int heads, kv_heads, kv_head;
    int first_token, tokens;    // query tokens of the tile
    int first_position;         // position of the first of them
    int window;                 // 0 = none
    float scale;

    void run() const {
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<T, bf16>)
            if (tokens * (heads / kv_heads) > FEW_ROWS) return run_in_pairs();
#endif
        alignas(64) float q[MAX_ROWS * D], acc[MAX_ROWS * D], key[D * BS], value[SPAN * D], p[MAX_ROWS * SPAN];
        float top[MAX_ROWS], total[MAX_ROWS];
        const int group = heads / kv_heads, rows = tokens * group;
        for (int r = 0; r < rows; r++) {
            const T* src = row(query, r, group);
            for (int d = 0; d < D; d += 16) {
                store16(q + r * D + d, load16(src + d));
                store16(acc + r * D + d, vec{});
            }
            top[r] = -std::numeric_limits<float>::infinity();
            total[r] = 0;
        }
        const int context = first_position + tokens;
        const bool few = rows <= FEW_ROWS;  // a decode: keys and values are used once, so they are widened on the way
        for (int from = begin(); from < context; from += SPAN) {
            const int keys_here = context - from < SPAN ? context - from : SPAN;
            const int blocks_here = (keys_here + BS - 1) / BS;
            for (int b = 0; b < blocks_here; b++) {
                const int at = from / BS + b;
                const T* src = block(keys, at);
                if (few) {
                    score_rows<D>(q, src, later(keys, at, context), p + b * BS, rows);
                    continue;
                }
                for (int d = 0; d < D; d++) store16(key + d * BS, load16(src + d * BS));
                score_rows<D>(q, key, (const float*)nullptr, p + b * BS, rows);
                const T* vsrc = block(values, at);
                const int valid = keys_here - b * BS < BS ? keys_here - b * BS : BS;
                for (int i = 0; i < valid * D; i += 16) store16(value + b * BS * D + i, load16(vsrc + i));
            }
            softmax(rows, group, from, keys_here, blocks_here, p, acc, top, total, p);
            if (!few) {
                weigh_rows<D>(p, value, (const float*)nullptr, keys_here, acc, rows);
                continue;
            }
            for (int b = 0; b < blocks_here; b++) {
                const int at = from / BS + b;
                const int valid = keys_here - b * BS < BS ? keys_here - b * BS : BS;
                weigh_rows<D>(p + b * BS, block(values, at), later(values, at, context), valid, acc, rows);
            }
        }
        finish(rows, group, acc, total);
    }

#ifdef __AVX512BF16__
    void run_in_pairs() const {
        alignas(64) float acc[MAX_ROWS * D], p[MAX_ROWS * SPAN];
        alignas(64) bf16 q[MAX_ROWS * D], weights[MAX_ROWS * SPAN];
        __m512i key[SPAN / BS * (D / 2)], value[SPAN / 2 * (D / 16)];
        float top[MAX_ROWS], total[MAX_ROWS];
        const int group = heads / kv_heads, rows = tokens * group, context = first_position + tokens;
        for (int r = 0; r < rows; r++) {
            std::memcpy(q + r * D, row(query, r, group), D * sizeof(bf16));
            for (int d = 0; d < D; d += 16) store16(acc + r * D + d, vec{});
            top[r] = -std::numeric_limits<float>::infinity();
            total[r] = 0;
        }
        const uint32_t *query_pairs = (const uint32_t*)q, *weight_pairs = (const uint32_t*)weights;
        for (int from = begin(); from < context; from += SPAN) {
            const int keys_here = context - from < SPAN ? context - from : SPAN;
            const int blocks_here = (keys_here + BS - 1) / BS, pairs_here = (keys_here + 1) / 2;
            for (int b = 0; b < blocks_here; b++) {
                const int valid = keys_here - b * BS < BS ? keys_here - b * BS : BS;
                pairs::pair_keys<D>(block(keys, from / BS + b), key + b * (D / 2));
                pairs::pair_values<D>(block(values, from / BS + b), valid, value + b * (BS / 2) * (D / 16));
            }
            int r = 0;
            for (; r + 6 <= rows; r += 6)
                pairs::score_rows<6, D>(query_pairs + r * (D / 2), key, blocks_here, p + r * SPAN, SPAN);
            for (; r < rows; r++)
                pairs::score_rows<1, D>(query_pairs + r * (D / 2), key, blocks_here, p + r * SPAN, SPAN);
            softmax(rows, group, from, keys_here, blocks_here, p, acc, top, total, weights);
            for (r = 0; r + 6 <= rows; r += 6)
                pairs::weigh_rows<6, D>(weight_pairs + r * (SPAN / 2), SPAN / 2, value, pairs_here, acc + r * D);
            for (; r < rows; r++)
                pairs::weigh_rows<1, D>(weight_pairs + r * (SPAN / 2), SPAN / 2, value, pairs_here, acc + r * D);
        }
        finish(rows, group, acc, total);
    }
#endif

    // The first key that a window leaves to the first token, rounded down to a span
    int begin() const {
        const int first = window ? first_position - window + 1 : 0;
        return first > 0 ? first / SPAN * SPAN : 0;
    }

    void finish(int rows, int group, const float* acc, const float* total) const {
        for (int r = 0; r < rows; r++) {
            const float inverse = 1.0f / total[r];
            T* dst = const_cast<T*>(row(out, r, group));
            for (int d = 0; d < D; d += 16) store16(dst + d, load16(acc + r * D + d) * inverse);
        }
    }

    const T* block(const T* base, int index) const {
        return base + ((int64_t)table[index] * kv_heads + kv_head) * D * BS;
    }

    // Blocks lie anywhere, so a later one is asked for while this one is worked on
    const T* later(const T* base, int index, int context) const {
        const int next = index + AHEAD, last = (context - 1) / BS;
        return block(base, next < last ? next : last);
    }

    const T* row(const T* base, int r, int group) const {
        return base + ((int64_t)(first_token + r / group) * heads + kv_head * group + r % group) * D;
    }

    // scores [rows, SPAN] of one span as weights, and what was summed before faded by what its peak has risen
    template <typename W>
    void softmax(int rows, int group, int from, int keys_here, int blocks_here, const float* scores, float* acc,
                 float* top, float* total, W* weights) const {
        constexpr int PARTS = SPAN / BS;
        const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const vec dead = splat(-std::numeric_limits<float>::infinity());
        for (int r = 0; r < rows; r++) {
            const int position = first_position + r / group;
            const bool masked = from + keys_here - 1 > position || keys_here < blocks_here * BS || window;
            vec x[PARTS], best = dead;
#pragma GCC unroll 4
            for (int b = 0; b < PARTS; b++) {
                x[b] = b < blocks_here ? load16(scores + r * SPAN + b * BS) * scale : dead;
                if (masked) {
                    const ivec at = lane + (from + b * BS);
                    x[b] = at > position ? dead : x[b];
                    if (window) x[b] = at <= position - window ? dead : x[b];
                }
                best = max(x[b], best);
            }
            const float highest = hmax(best), peak = highest > top[r] ? highest : top[r];
            if (peak == -std::numeric_limits<float>::infinity()) {   // nothing visible in this span
                for (int b = 0; b < blocks_here; b++) store16(weights + r * SPAN + b * BS, vec{});
                continue;
            }
            const float fade = top[r] == peak ? 1.0f : std::exp(top[r] - peak);
            vec sum = {};
#pragma GCC unroll 4
            for (int b = 0; b < PARTS; b++) {
                if (b >= blocks_here) break;
                const vec e = vexp(x[b] - peak);
                store16(weights + r * SPAN + b * BS, e);
                sum += e;
            }
            total[r] = total[r] * fade + hsum(sum);
            top[r] = peak;
            if (fade != 1.0f)
                for (int d = 0; d < D; d += 16) store16(acc + r * D + d, load16(acc + r * D + d) * fade);
        }
    }
};

template <typename T, int D>
void attend(const void* query, const void* keys, const void* values, void* out, const int32_t* query_start,
            const int32_t* context_lens, const int32_t* tables, int seqs, int table_width, int heads, int kv_heads,
            int window, float scale) {
    const int group = heads / kv_heads;
    const int tile = MAX_ROWS / group > 0 ? MAX_ROWS / group : 1;
    // tiles are counted, not stored: item i is found by walking the sequences
    int tiles = 0;
    for (int s = 0; s < seqs; s++) tiles += (query_start[s + 1] - query_start[s] + tile - 1) / tile;
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < tiles * kv_heads; i++) {
        int left = i / kv_heads, s = 0;
        for (;; s++) {
            const int here = (query_start[s + 1] - query_start[s] + tile - 1) / tile;
            if (left < here) break;
            left -= here;
        }
        // the longest contexts of a chunk first, so that no thread is left alone with one at the end
        const int n = query_start[s + 1] - query_start[s];
        const int index = (n + tile - 1) / tile - 1 - left;
        const int first = index * tile;
        Item<T, D> item;
        item.query = (const T*)query; item.keys = (const T*)keys; item.values = (const T*)values; item.out = (T*)out;
        item.table = tables + (int64_t)s * table_width;
        item.heads = heads; item.kv_heads = kv_heads; item.kv_head = i % kv_heads;
        item.first_token = query_start[s] + first;
        item.tokens = n - first < tile ? n - first : tile;
        item.first_position = context_lens[s] - n + first;
        item.window = window; item.scale = scale;
        item.run();
    }
}

template <typename T>
int attend_any(int dim, const void* q, const void* k, const void* v, void* o, const int32_t* qs, const int32_t* cl,
               const int32_t* tables, int seqs, int width, int heads, int kv_heads, int window, float scale) {
    switch (dim) {
#define CASE(D) case D: attend<T, D>(q, k, v, o, qs, cl, tables, seqs, width, heads, kv_heads, window, scale); return 0;
        CASE(16) CASE(32) CASE(64) CASE(80) CASE(96) CASE(128) CASE(256)
#undef CASE
    }
    return 1;
}

template <typename T>
void store(const T* key, const T* value, T* keys, T* values, const int64_t* slots, int tokens, int kv_heads, int dim,
           int64_t key_stride, int64_t value_stride) {
    for (int t = 0; t < tokens; t++) {
        const int64_t block = slots[t] / BS, offset = slots[t] % BS;
        for (int h = 0; h < kv_heads; h++) {
            const T* k = key + t * key_stride + h * dim;
            T* to = keys + (block * kv_heads + h) * dim * BS + offset;
            for (int d = 0; d < dim; d++) to[d * BS] = k[d];
            std::memcpy(values + ((block * kv_heads + h) * BS + offset) * dim, value + t * value_stride + h * dim,
                        dim * sizeof(T));
        }
    }
}

}  // namespace

extern "C" {

// 0 on success, 1 for a head dimension that was not compiled in
int refdesk_attend(int is_bf16, int dim, const void* query, const void* keys, const void* values, void* out,
                   const int32_t* query_start, const int32_t* context_lens, const int32_t* tables, int seqs,
                   int table_width, int heads, int kv_heads, int window, float scale) {
    return is_bf16 ? attend_any<bf16>(dim, query, keys, values, out, query_start, context_lens, tables, seqs,
                                      table_width, heads, kv_heads, window, scale)
                   : attend_any<float>(dim, query, keys, values, out, query_start, context_lens, tables, seqs,
                                       table_width, heads, kv_heads, window, scale);
}

void refdesk_store(int is_bf16, const void* key, const void* value, void* keys, void* values, const int64_t* slots,
                   int tokens, int kv_heads, int dim, int64_t key_stride, int64_t value_stride) {
    if (is_bf16)
        store((const bf16*)key, (const bf16*)value, (bf16*)keys, (bf16*)values, slots, tokens, kv_heads, dim,
              key_stride, value_stride);
    else
        store((const float*)key, (const float*)value, (float*)keys, (float*)values, slots, tokens, kv_heads, dim,
              key_stride, value_stride);
}
}
