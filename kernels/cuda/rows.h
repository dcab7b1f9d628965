// The kernels' bodies, written once over a `Machine` that supplies threads, barriers and copies. The .cu gives them a GPU;
// emulation.cpp gives them a CPU, so that tests run this very text where there is no GPU.
//
// A row is shared by the blocks of one cluster. Each block holds a slice of it in shared memory, as 16-byte slots; a slot
// is filled, read and used up by one and the same thread. So no barrier guards the data: barriers guard only the few
// numbers that threads, and then blocks, tell one another.
#pragma once

#include "plan.h"

namespace megaprior {

// sum of exp(x - max) over some logits. Empty: max = -inf, sum = 0.
struct Partial {
    float max, sum;
};

// What a block shares among its threads and its cluster.
struct Exchange {
    Partial warps[kThreads / kWarp];  // of this block
    Partial blocks[kBlocks];          // of the row; written by the blocks of the cluster
    float block_target, row_target;   // the target's logit, where this block holds it; the same, told to all
};
static_assert(sizeof(Exchange) <= 256, "kSlotsOfOne leaves 256 bytes");

template <typename T>
struct Job {
    T* logits;
    int64_t vocabulary, row_stride;  // in elements
    const int64_t* targets;
    const float* factor;
    float* nll;
    int slots;
    bool gradient;
};

// A row seen as 16-byte vectors. It may begin and end inside one: elements [lead, end) counted from `base` are the row.
template <typename T>
struct Row {
    static constexpr int kPerVector = Element<T>::kPerVector;
    T* base;  // 16-byte aligned, at most 15 bytes before the row
    int lead, end;

    MEGAPRIOR_DEVICE Row(T* first, int64_t length) {
        lead = static_cast<int>((reinterpret_cast<uintptr_t>(first) & 15) / sizeof(T));
        base = first - lead;
        end = lead + static_cast<int>(length);
    }

    MEGAPRIOR_DEVICE bool whole(int vector) const {
        return vector * kPerVector >= lead && (vector + 1) * kPerVector <= end;
    }
    MEGAPRIOR_DEVICE bool holds(int element) const { return element >= lead && element < end; }
    MEGAPRIOR_DEVICE T* at(int vector) const { return base + vector * kPerVector; }
    MEGAPRIOR_DEVICE int vectors() const { return (end + kPerVector - 1) / kPerVector; }

    // The vectors at the two ends go element by element: what lies beside a row may be another row, or nothing at all.
    MEGAPRIOR_DEVICE void load_end(int vector, float (&x)[kPerVector], float beside) const {
        MEGAPRIOR_UNROLL
        for (int j = 0; j < kPerVector; ++j)
            x[j] = holds(vector * kPerVector + j) ? Element<T>::widen(at(vector)[j]) : beside;
    }
    MEGAPRIOR_DEVICE void store_end(int vector, const float (&x)[kPerVector]) const {
        MEGAPRIOR_UNROLL
        for (int j = 0; j < kPerVector; ++j)
            if (holds(vector * kPerVector + j)) at(vector)[j] = Element<T>::narrow(x[j]);
    }
};

// The slots of one thread: `thread`, `thread + step`, ... below `count`; slot s holds the row's vector `first + s`.
struct Share {
    int first, count, thread, step;
};

template <typename T, typename Machine>
MEGAPRIOR_DEVICE void copy_slots(const Machine& machine, const Row<T>& row, const Share& share, Vector* slots) {
    for (int slot = share.thread; slot < share.count; slot += share.step) {
        const int vector = share.first + slot;
        if (row.whole(vector)) {
            machine.copy(&slots[slot], row.at(vector));  // asynchronous: the whole slice is on its way at once
        } else {
            float x[Element<T>::kPerVector];
            row.load_end(vector, x, -infinity());  // adds nothing to a sum
            slots[slot] = Element<T>::pack(x);
        }
    }
    machine.wait_for_copies();  // this thread's own; nobody else reads them
}

// exp(x - origin) must be 0, not NaN, as long as every x is -inf.
MEGAPRIOR_DEVICE float origin(float max) { return max == -infinity() ? 0.0f : max; }

template <typename T>
MEGAPRIOR_DEVICE Partial partial_of(const Share& share, const Vector* slots) {
    constexpr int kPerVector = Element<T>::kPerVector;
    Partial partial = {-infinity(), 0.0f};
    for (int slot = share.thread; slot < share.count; slot += share.step) {
        float x[kPerVector];
        Element<T>::unpack(slots[slot], x);
        float largest = x[0];
        MEGAPRIOR_UNROLL
        for (int j = 1; j < kPerVector; ++j) largest = fmaxf(largest, x[j]);
        if (largest > partial.max) {  // ever rarer along a row
            partial.sum *= Element<T>::exponential(partial.max - largest);
            partial.max = largest;
        }
        const float from = origin(partial.max);
        MEGAPRIOR_UNROLL
        for (int j = 0; j < kPerVector; ++j) x[j] = Element<T>::exponential(x[j] - from);
        MEGAPRIOR_UNROLL
        for (int width = kPerVector / 2; width > 0; width /= 2) {
            MEGAPRIOR_UNROLL
            for (int j = 0; j < width; ++j) x[j] += x[j + width];
        }
        partial.sum += x[0];  // NaN here if there is one among the logits: fmaxf has passed over it
    }
    return partial;
}

// Every lane ends with the same bits: both lanes of a pair add the same two numbers.
template <typename T, typename Machine>
MEGAPRIOR_DEVICE Partial merge_warp(const Machine& machine, Partial partial) {
    float max = partial.max;
    MEGAPRIOR_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) max = fmaxf(max, machine.shuffle(max, mask));
    float sum = partial.sum * Element<T>::exponential(partial.max - origin(max));
    MEGAPRIOR_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += machine.shuffle(sum, mask);
    return {max, sum};
}

template <typename T, typename Machine>
MEGAPRIOR_DEVICE void write_zeros(const Machine& machine, const Row<T>& row, const Share& share) {
    const float zeros[Element<T>::kPerVector] = {};
    for (int slot = share.thread; slot < share.count; slot += share.step) {
        const int vector = share.first + slot;
        if (row.whole(vector)) machine.store(row.at(vector), Vector{});
        else row.store_end(vector, zeros);
    }
}

// x <- scale * exp(x - max), and `at_target` in the row's element `target` (negative where this thread does not hold it).
template <typename T, typename Machine>
MEGAPRIOR_DEVICE void write_gradient(const Machine& machine, const Row<T>& row, const Share& share, const Vector* slots,
                                     float max, float scale, int target, float at_target) {
    constexpr int kPerVector = Element<T>::kPerVector;
    const int target_vector = target < 0 ? -1 : target / kPerVector;
    for (int slot = share.thread; slot < share.count; slot += share.step) {
        const int vector = share.first + slot;
        float x[kPerVector];
        Element<T>::unpack(slots[slot], x);
        MEGAPRIOR_UNROLL
        for (int j = 0; j < kPerVector; ++j) x[j] = scale * Element<T>::exponential(x[j] - max);
        if (vector == target_vector) {
            MEGAPRIOR_UNROLL
            for (int j = 0; j < kPerVector; ++j)
                if (vector * kPerVector + j == target) x[j] = at_target;
        }
        if (row.whole(vector)) machine.store(row.at(vector), Element<T>::pack(x));
        else row.store_end(vector, x);
    }
}

// One thread's work on the row of its cluster. Barriers, in order: (1) cluster: every block has started, awaited only
// before the first write into another block; (2) block: the warps' partials are there; (3) cluster: the blocks' partials
// are there. After (3) a block touches nothing but its own memory, so blocks may end in any order.
template <typename T, typename Machine>
MEGAPRIOR_DEVICE void cross_entropy_row(const Machine& machine, const Job<T>& job) {
    const int64_t index = machine.row();
    const int64_t target = job.targets[index];
    const Row<T> row(job.logits + index * job.row_stride, job.vocabulary);
    const int rank = machine.rank(), thread = machine.thread(), first = rank * job.slots;
    const int left = row.vectors() - first;
    const Share share = {first, left < job.slots ? left : job.slots, thread, machine.threads()};

    if (target < 0) {  // the same for every thread of the cluster: nobody waits at a barrier
        if (rank == 0 && thread == 0) job.nll[index] = 0.0f;
        if (job.gradient) write_zeros(machine, row, share);
        return;
    }
    machine.cluster_arrive();  // (1)
    Vector* slots = machine.slots();
    Exchange* exchange = machine.exchange();
    const float factor = job.gradient ? job.factor[index] : 0.0f;  // now, while there is something to wait for anyway
    copy_slots(machine, row, share, slots);

    const bool in_range = target < job.vocabulary;  // else the row becomes NaN: nobody may read beside it
    const int element = in_range ? row.lead + static_cast<int>(target) : -1;
    const int target_slot = in_range ? element / Row<T>::kPerVector - first : -1;
    const bool in_block = target_slot >= 0 && target_slot < share.count;
    const bool mine = in_block && target_slot % share.step == thread;
    if (mine) {
        T logit;
        memcpy(&logit, reinterpret_cast<const char*>(&slots[target_slot]) + element % Row<T>::kPerVector * sizeof(T),
               sizeof(T));
        exchange->block_target = Element<T>::widen(logit);
    }
    const int warp = thread / kWarp, lane = thread % kWarp;
    const Partial of_warp = merge_warp<T>(machine, partial_of<T>(share, slots));
    if (lane == 0) exchange->warps[warp] = of_warp;
    machine.block_barrier();  // (2)
    machine.cluster_wait();   // (1)
    const Partial empty = {-infinity(), 0.0f};
    if (warp == 0) {
        const Partial of_block = merge_warp<T>(machine, lane < share.step / kWarp ? exchange->warps[lane] : empty);
        if (lane < machine.blocks()) {
            Exchange* there = machine.exchange_of(lane);
            there->blocks[rank] = of_block;
            if (in_block) there->row_target = exchange->block_target;
        }
        machine.warp_barrier();
    }
    machine.cluster_arrive_release();  // (3)
    machine.cluster_wait();            // (3)

    const Partial all = merge_warp<T>(machine, lane < machine.blocks() ? exchange->blocks[lane] : empty);
    const float logit = in_range ? exchange->row_target : not_a_number();
    const float nll = (all.max - logit) + logf(all.sum);  // neither term is negative: nothing cancels
    if (rank == 0 && thread == 0) job.nll[index] = nll;
    if (!job.gradient) return;
    if (factor == 0.0f) {
        write_zeros(machine, row, share);
        return;
    }
    const float scale = in_range ? factor / all.sum : not_a_number();
    const float at_target = mine ? factor * expm1f(-nll) : 0.0f;  // p - 1 without cancellation
    write_gradient(machine, row, share, slots, all.max, scale, mine ? element : -1, at_target);
}

constexpr int kScaleThreads = 256;
constexpr int kScaleVectors = 4;  // loads in flight per thread

template <typename T>
struct ScaleJob {
    T* values;
    int64_t rows, columns, row_stride;
    const float* scale;
    int64_t pieces;  // of a row
};

template <typename T>
int64_t scale_pieces(int64_t columns) {
    constexpr int64_t kElements = static_cast<int64_t>(kScaleThreads) * kScaleVectors * Element<T>::kPerVector;
    return (columns + Element<T>::kPerVector - 1 + kElements - 1) / kElements;
}

template <typename T, typename Machine>
MEGAPRIOR_DEVICE void scale_rows(const Machine& machine, const ScaleJob<T>& job) {
    constexpr int kPerVector = Element<T>::kPerVector;
    const float scale = *job.scale;
    if (scale == 1.0f) return;
    for (int64_t piece = machine.block(); piece < job.rows * job.pieces; piece += machine.grid()) {
        const Row<T> row(job.values + piece / job.pieces * job.row_stride, job.columns);
        const int first = static_cast<int>(piece % job.pieces) * kScaleThreads * kScaleVectors + machine.thread();
        Vector held[kScaleVectors];
        MEGAPRIOR_UNROLL
        for (int k = 0; k < kScaleVectors; ++k) {
            const int vector = first + k * kScaleThreads;
            if (row.whole(vector)) held[k] = machine.load(row.at(vector));
        }
        MEGAPRIOR_UNROLL
        for (int k = 0; k < kScaleVectors; ++k) {
            const int vector = first + k * kScaleThreads;
            float x[kPerVector];
            const bool whole = row.whole(vector);
            if (whole) Element<T>::unpack(held[k], x);
            else row.load_end(vector, x, 0.0f);
            MEGAPRIOR_UNROLL
            for (int j = 0; j < kPerVector; ++j) x[j] *= scale;
            if (whole) machine.store(row.at(vector), Element<T>::pack(x));
            else row.store_end(vector, x);
        }
    }
}

}  // namespace megaprior
