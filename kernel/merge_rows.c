// W + BA of some rows of a weight, rounded once, and the figures of what was stored: one pass over the weight.
//
// A block of ROWS x COLUMNS entries of the sum stays in registers while the products of all ranks are added to it, so
// BA is never in memory. All arithmetic is in fp32, with fused multiplications and additions: an entry of BA is the sum
// over the ranks in their order. The weight is added last. The result is rounded to nearest even.
//
// Built once for each instruction set (hatch_build.py). LANES is the number of fp32 of a register, COLUMNS a multiple
// of it; ROWS x COLUMNS / LANES registers hold a block. No function of the C library is called.

#include <stdint.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
// What Windows calls when it loads a library that has no C runtime.
int __stdcall DllMainCRTStartup(void *module, unsigned reason, void *reserved) {
    (void)module, (void)reason, (void)reserved;
    return 1;
}
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
enum { LANES = 16, VECTORS = 4 };
#elif defined(__AVX2__)
enum { LANES = 8, VECTORS = 2 };
#else  // NEON
enum { LANES = 4, VECTORS = 4 };
#endif
enum { ROWS = 4, COLUMNS = LANES * VECTORS, ROWS_OF_A_STRIP = 32 };

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef _Float16 Float16s __attribute__((vector_size(2 * LANES)));

enum Type { FLOAT32, FLOAT16, BFLOAT16 };  // the numbers of these are part of the interface
static const uint32_t EXPONENT = 0x7f800000;

typedef struct {
    int64_t rows, columns, rank;
    const void *weight;      // (rows, columns)
    void *output;            // (rows, columns); NULL: only the norms are computed
    const float *b, *a;      // (rows, rank) with the scale, (rank, columns)
    const float *factors;    // (rows,), that multiply the sums; NULL: none
    double *norms;           // (rows,), receives the squared norm of each row of W + BA; NULL: not wanted
    double *figures;         // 5 sums, see `Figures`; NULL: not wanted
    int64_t weight_stride, output_stride;  // entries from one row to the next
    int32_t weight_type, output_type;
} Job;

// |W|², |D|², <W' - W, D>, |W' - W - D|² and the entries where W' is not W, where D is the change and W' is stored.
typedef struct {
    Floats weight, change, kept, noise;
    Words changed, bad;  // `bad` has bits where a sum is not finite
} Figures;

INLINE float one(const void *place, int64_t index, enum Type type) {
    if (type == FLOAT32) return ((const float *)place)[index];
    if (type == FLOAT16) return (float)((const _Float16 *)place)[index];
    union { uint32_t bits; float number; } found = {(uint32_t)((const uint16_t *)place)[index] << 16};
    return found.number;
}

// `count` entries, the others zero. A whole register is read at once.
INLINE Floats load(const void *place, int64_t index, int64_t count, enum Type type) {
    Floats found = {0};
    if (count < LANES) {
        for (int64_t lane = 0; lane < count; lane++) found[lane] = one(place, index + lane, type);
        return found;
    }
    if (type == FLOAT32) {
        __builtin_memcpy(&found, (const float *)place + index, sizeof found);
    } else if (type == FLOAT16) {
        Float16s halves;
        __builtin_memcpy(&halves, (const _Float16 *)place + index, sizeof halves);
        found = __builtin_convertvector(halves, Floats);
    } else {
        Halves halves;
        __builtin_memcpy(&halves, (const uint16_t *)place + index, sizeof halves);
        found = (Floats)(__builtin_convertvector(halves, Words) << 16);
    }
    return found;
}

// Store `count` entries, rounded, and return them as they are stored.
INLINE Floats store(Floats sum, void *place, int64_t index, int64_t count, enum Type type) {
    Floats stored = sum;
    char *target = (char *)place + index * (type == FLOAT32 ? 4 : 2);
    if (type == FLOAT32) {
        if (count >= LANES) __builtin_memcpy(target, &sum, sizeof sum);
        else for (int64_t lane = 0; lane < count; lane++) ((float *)target)[lane] = sum[lane];
        return stored;
    }
    Halves halves;
    if (type == FLOAT16) {
        Float16s rounded = __builtin_convertvector(sum, Float16s);
        stored = __builtin_convertvector(rounded, Floats);
        halves = (Halves)rounded;
    } else {
        Words bits = (Words)sum;
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        stored = (Floats)(bits << 16);
        halves = __builtin_convertvector(bits, Halves);
    }
    if (count >= LANES) __builtin_memcpy(target, &halves, sizeof halves);
    else for (int64_t lane = 0; lane < count; lane++) ((uint16_t *)target)[lane] = halves[lane];
    return stored;
}

INLINE double sum_of(Floats values) {
    double total = 0;
    for (int lane = 0; lane < LANES; lane++) total += (double)values[lane];
    return total;
}

INLINE Floats factor_a(const Job job, int64_t rank, int64_t column, int64_t count) {
    return load(job.a, rank * job.columns + column, count, FLOAT32);
}

// One block, of `height` rows and `width` columns; constants where it is whole, so that it stays in registers.
INLINE void block(const Job job, int64_t row, int64_t column, int height, int64_t width, enum Type from, enum Type to,
                  Figures *figures) {
    Floats sums[ROWS][VECTORS] = {0};
    const float *b = job.b + row * job.rank;
    for (int64_t rank = 0; rank < job.rank; rank++) {
        Floats a[VECTORS];
        for (int v = 0; v < VECTORS; v++) a[v] = factor_a(job, rank, column + v * LANES, width - v * LANES);
        for (int i = 0; i < height; i++)
            for (int v = 0; v < VECTORS; v++) sums[i][v] += b[i * job.rank + rank] * a[v];
    }
    for (int i = 0; i < height; i++) {
        double norm = 0;
        for (int v = 0; v < VECTORS; v++) {
            int64_t count = width - v * LANES;
            if (count <= 0) break;
            int64_t at = column + v * LANES;
            Floats weight = load(job.weight, (row + i) * job.weight_stride + at, count, from);
            Floats change = sums[i][v], sum = weight + change;
            if (job.norms) norm += sum_of(sum * sum);
            if (!job.output) continue;
            if (job.factors) {
                sum *= job.factors[row + i];
                change = sum - weight;
            }
            Floats stored = store(sum, job.output, (row + i) * job.output_stride + at, count, to);
            figures->bad |= (Words)(((Words)stored & EXPONENT) == EXPONENT) | (Words)(((Words)sum & EXPONENT) == EXPONENT);
            if (!job.figures) continue;
            Floats kept = stored - weight, noise = kept - change;
            figures->weight += weight * weight;
            figures->change += change * change;
            figures->kept += kept * change;
            figures->noise += noise * noise;
            figures->changed -= (Words)(kept != 0);  // a true comparison has all bits, which is -1
        }
        if (job.norms) job.norms[row + i] += norm;
    }
}

// A strip of rows, all columns. The sums of the figures are short, so that fp32 is enough for them.
INLINE uint32_t strip(const Job job, int64_t first, int64_t last, enum Type from, enum Type to) {
    Words bad = {0};
    for (int64_t column = 0; column < job.columns; column += COLUMNS) {
        Figures figures = {0};
        int64_t width = job.columns - column, row = first;
        if (width >= COLUMNS)
            for (; row + ROWS <= last; row += ROWS) block(job, row, column, ROWS, COLUMNS, from, to, &figures);
        for (; row < last; row++) block(job, row, column, 1, width < COLUMNS ? width : COLUMNS, from, to, &figures);
        bad |= figures.bad;
        if (!job.figures) continue;
        job.figures[0] += sum_of(figures.weight);
        job.figures[1] += sum_of(figures.change);
        job.figures[2] += sum_of(figures.kept);
        job.figures[3] += sum_of(figures.noise);
        for (int lane = 0; lane < LANES; lane++) job.figures[4] += figures.changed[lane];
    }
    uint32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= bad[lane];
    return found;
}

INLINE int32_t merged(const Job job, enum Type from, enum Type to) {
    uint32_t bad = 0;
    for (int64_t row = 0; row < job.rows; row += ROWS_OF_A_STRIP) {
        int64_t last = row + ROWS_OF_A_STRIP < job.rows ? row + ROWS_OF_A_STRIP : job.rows;
        bad |= strip(job, row, last, from, to);
    }
    return bad != 0;
}

// Fill the output. Returns 1 where a sum is not finite in its type, else 0; -1 for an unknown type.
EXPORT int32_t merge_rows(const Job *job) {
    switch (job->weight_type * 3 + job->output_type) {
        case 0: return merged(*job, FLOAT32, FLOAT32);
        case 1: return merged(*job, FLOAT32, FLOAT16);
        case 2: return merged(*job, FLOAT32, BFLOAT16);
        case 3: return merged(*job, FLOAT16, FLOAT32);
        case 4: return merged(*job, FLOAT16, FLOAT16);
        case 5: return merged(*job, FLOAT16, BFLOAT16);
        case 6: return merged(*job, BFLOAT16, FLOAT32);
        case 7: return merged(*job, BFLOAT16, FLOAT16);
        case 8: return merged(*job, BFLOAT16, BFLOAT16);
    }
    return -1;
}
