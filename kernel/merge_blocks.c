// W + BA of rows that are stored in the blocks of ggml, and the codes nearest to it on the steps and offsets that the
// blocks have: one pass over the bytes. A tile of a few rows is decoded, summed and encoded in the first cache.
//
// The arithmetic is that of `lora_export.storage.gguf_blocks`, operation by operation, so that equal sums get equal
// codes. The product of a step and a code is exact in fp32: it is the same whether it is fused with a sum or not.

#include "merge_rows.c"

enum { TILE = 256 };  // columns: a multiple of the elements of every block

typedef uint8_t Codes __attribute__((vector_size(LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

INLINE Codes load_codes(const uint8_t *place) {
    Codes found;
    __builtin_memcpy(&found, place, sizeof found);
    return found;
}

// Some bits of each code: see `gguf_blocks.Plane`.
typedef struct {
    int64_t start, chunks, width, bits;
} Plane;

// A few rows of a tile, as numbers and as codes.
typedef struct {
    float weight[ROWS][TILE], sum[ROWS][TILE];
    uint8_t codes[ROWS][TILE];
} Tile;

typedef struct {
    int64_t rows, columns, rank;
    // Memory for one Tile, at a multiple of 64 bytes: Windows needs its C runtime for so much on the stack
    Tile *tile;
    const uint8_t *blocks;         // (rows, columns / elements, bytes)
    uint8_t *output;               // a copy of `blocks`, receives other codes
    const float *steps, *offsets;  // (rows, columns / group)
    const float *b, *a;            // (rows, rank) with the scale, (rank, columns)
    double *figures;               // 5 sums, see `Figures`; NULL: not wanted
    int64_t elements, bytes, group;  // of a block; a group has one step
    int64_t first, count;            // the number of code 0, and how many codes there are
    int64_t planes;
    Plane plane[2];                  // the lowest bits first
} BlockJob;

INLINE void read_plane(const uint8_t *stored, int64_t chunks, int width, int bits, int shift, uint8_t *codes) {
    for (int64_t chunk = 0; chunk < chunks; chunk++, stored += width)
        for (int place = 0; place < 8; place += bits, codes += width)
            for (int i = 0; i < width; i++) {
                uint8_t found = (uint8_t)((stored[i] >> place & ((1 << bits) - 1)) << shift);
                codes[i] = shift ? codes[i] | found : found;
            }
}

INLINE void write_plane(uint8_t *stored, int64_t chunks, int width, int bits, int shift, const uint8_t *codes) {
    for (int64_t chunk = 0; chunk < chunks; chunk++, stored += width)
        for (int place = 0; place < 8; place += bits, codes += width)
            for (int i = 0; i < width; i++) {
                uint8_t found = (uint8_t)((codes[i] >> shift & ((1 << bits) - 1)) << place);
                stored[i] = place ? stored[i] | found : found;
            }
}

// What the planes of all types are, as constants: a loop of a known length becomes a few instructions.
#define EACH_PLANE(CALL)                                  \
    switch (plane.width * 64 + plane.bits * 8 + shift) {  \
        case 16 * 64 + 4 * 8: CALL(16, 4, 0); return;     \
        case 32 * 64 + 4 * 8: CALL(32, 4, 0); return;     \
        case 64 * 64 + 4 * 8: CALL(64, 4, 0); return;     \
        case 32 * 64 + 2 * 8: CALL(32, 2, 0); return;     \
        case 32 * 64 + 2 * 8 + 4: CALL(32, 2, 4); return; \
        case 32 * 64 + 1 * 8 + 2: CALL(32, 1, 2); return; \
        case 32 * 64 + 1 * 8 + 4: CALL(32, 1, 4); return; \
        case 1 * 64 + 1 * 8 + 4: CALL(1, 1, 4); return;   \
    }

INLINE void read_codes(const Plane plane, const uint8_t *block, int64_t elements, int shift, uint8_t *codes) {
    const uint8_t *stored = block + plane.start;
    if (plane.bits == 8) {  // a signed byte
        for (int64_t at = 0; at < elements; at += LANES) *(Codes *)(codes + at) = load_codes(stored + at) ^ 0x80;
        return;
    }
#define READ(WIDTH, BITS, SHIFT) read_plane(stored, plane.chunks, WIDTH, BITS, SHIFT, codes)
    EACH_PLANE(READ)
}

INLINE void write_codes(const Plane plane, uint8_t *block, int64_t elements, int shift, const uint8_t *codes) {
    uint8_t *stored = block + plane.start;
    if (plane.bits == 8) {
        for (int64_t at = 0; at < elements; at += LANES) {
            Codes found = *(Codes *)(codes + at) ^ 0x80;
            __builtin_memcpy(stored + at, &found, sizeof found);
        }
        return;
    }
#define WRITE(WIDTH, BITS, SHIFT) write_plane(stored, plane.chunks, WIDTH, BITS, SHIFT, codes)
    EACH_PLANE(WRITE)
}

INLINE Floats all(float value) { return (Floats){0} + value; }

INLINE Floats element(Codes codes, float first, float step, float offset) {
    Floats number = __builtin_convertvector(__builtin_convertvector(codes, Integers), Floats) + first;
    Floats product = number * step;
    return product + offset;
}

INLINE Floats absolute(Floats values) { return (Floats)((Words)values & 0x7fffffff); }

INLINE Floats where(Integers is, Floats one, Floats other) { return (Floats)(((Integers)one & is) | ((Integers)other & ~is)); }

// The codes nearest to these sums: see `BlockCodec.nearest`.
INLINE Codes nearest(Floats sum, float first, float last, float step, float offset, int is_odd, Codes stored) {
    const float whole = 12582912;  // 1.5 * 2^23: a small number added to it is rounded to a whole one
    Floats position = (sum - offset) / (step == 0 ? __builtin_inff() : step);
    position = where(position < first, all(first), where(position > last, all(last), position));
    position = (position + whole) - whole;
    Codes codes = __builtin_convertvector(__builtin_convertvector(position - first, Integers), Codes);
    if (!is_odd) return codes;
    Floats distance = absolute(element(codes, first, step, offset) - sum);
    Integers is_nearer = distance < absolute(element(stored, first, step, offset) - sum);
    return (codes & __builtin_convertvector(is_nearer, Codes)) | (stored & ~__builtin_convertvector(is_nearer, Codes));
}

// Whether a group of the block has no step, or one that fp32 does not resolve beside its offset.
INLINE int has_odd_steps(const BlockJob *job, int64_t at) {
    int is_odd = 0;
    for (int64_t group = at; group < at + job->elements / job->group; group++) {
        float step = job->steps[group], offset = job->offsets[group];
        is_odd |= step == 0 || __builtin_fabsf(offset) > 1048576 * __builtin_fabsf(step);
    }
    return is_odd;
}

INLINE void decode(const BlockJob *job, int64_t row, int64_t column, int64_t width, int here, Tile *tile) {
    uint8_t *codes = tile->codes[here];
    for (int64_t at = 0; at < width; at += job->elements) {
        const uint8_t *block = job->blocks + (row * job->columns + column + at) / job->elements * job->bytes;
        for (int which = 0, shift = 0; which < job->planes; shift += (int)job->plane[which++].bits)
            read_codes(job->plane[which], block, job->elements, shift, codes + at);
    }
    for (int64_t at = 0; at < width; at += LANES) {
        int64_t group = (row * job->columns + column + at) / job->group;
        Floats values = element(*(Codes *)(codes + at), (float)job->first, job->steps[group], job->offsets[group]);
        *(Floats *)(tile->weight[here] + at) = values;
    }
}

INLINE void encode(const BlockJob *job, int64_t row, int64_t column, int64_t width, int here, Tile *tile, Figures *figures) {
    float first = (float)job->first, last = first + (float)job->count - 1;
    for (int64_t start = 0; start < width; start += job->elements) {
        int64_t entry = row * job->columns + column + start;
        uint8_t *output = job->output + entry / job->elements * job->bytes, *codes = tile->codes[here] + start;
        int is_odd = has_odd_steps(job, entry / job->group);
        for (int64_t at = 0; at < job->elements; at += LANES) {
            float step = job->steps[(entry + at) / job->group], offset = job->offsets[(entry + at) / job->group];
            Floats sum = *(Floats *)(tile->sum[here] + start + at);
            Codes found = nearest(sum, first, last, step, offset, is_odd, *(Codes *)(codes + at));
            *(Codes *)(codes + at) = found;
            if (!job->figures) continue;
            Floats weight = *(Floats *)(tile->weight[here] + start + at);
            Floats change = sum - weight, kept = element(found, first, step, offset) - weight, noise = kept - change;
            figures->weight += weight * weight;
            figures->change += change * change;
            figures->kept += kept * change;
            figures->noise += noise * noise;
            figures->changed -= (Words)(kept != 0);
        }
        for (int which = 0, shift = 0; which < job->planes; shift += (int)job->plane[which++].bits)
            write_codes(job->plane[which], output, job->elements, shift, codes);
    }
}

// Up to ROWS rows of a tile: decoded, summed, encoded.
INLINE void tile_of_rows(const BlockJob *job, int64_t row, int64_t column, int height, int64_t width, Tile *tile, Figures *figures) {
    Job part = {.rows = height, .columns = job->columns, .rank = job->rank, .weight = tile->weight, .output = tile->sum,
                .b = job->b + row * job->rank, .a = job->a + column, .weight_stride = TILE, .output_stride = TILE};
    for (int i = 0; i < height; i++) decode(job, row + i, column, width, i, tile);
    int64_t at = 0;
    for (; height == ROWS && at + COLUMNS <= width; at += COLUMNS) block(part, 0, at, ROWS, COLUMNS, FLOAT32, FLOAT32, figures);
    for (; at < width; at += COLUMNS)
        for (int i = 0; i < height; i++) block(part, i, at, 1, width - at < COLUMNS ? width - at : COLUMNS, FLOAT32, FLOAT32, figures);
    for (int i = 0; i < height; i++) encode(job, row + i, column, width, i, tile, figures);
}

// Put codes into the output. Returns 1 where a sum is not finite, else 0.
EXPORT int32_t merge_blocks(const BlockJob *job) {
    Words bad = {0};
    for (int64_t start = 0; start < job->rows; start += ROWS_OF_A_STRIP) {
        int64_t stop = start + ROWS_OF_A_STRIP < job->rows ? start + ROWS_OF_A_STRIP : job->rows;
        for (int64_t column = 0; column < job->columns; column += TILE) {
            int64_t width = job->columns - column < TILE ? job->columns - column : TILE;
            Figures figures = {0};
            for (int64_t row = start; row < stop; row += ROWS)
                tile_of_rows(job, row, column, stop - row < ROWS ? (int)(stop - row) : ROWS, width, job->tile, &figures);
            bad |= figures.bad;
            if (!job->figures) continue;
            job->figures[0] += sum_of(figures.weight);
            job->figures[1] += sum_of(figures.change);
            job->figures[2] += sum_of(figures.kept);
            job->figures[3] += sum_of(figures.noise);
            for (int lane = 0; lane < LANES; lane++) job->figures[4] += figures.changed[lane];
        }
    }
    uint32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= bad[lane];
    return found != 0;
}
