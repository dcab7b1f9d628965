// How a row is laid out over the blocks of a cluster: decided on the host, from the vocabulary and the dtype alone.
#pragma once

#include "numbers.h"

namespace megaprior {

constexpr int kWarp = 32;
constexpr int kThreads = 512;  // at most; why so many stands at the kernels' launch bounds
constexpr int kBlocks = 8;     // the largest cluster that every device of compute capability 9.0 must take

constexpr int64_t kSlotsOfThree = 72 * 1024 / 16;             // slices up to this leave room for three blocks
constexpr int64_t kSlotsOfOne = (227 * 1024 - 256) / 16;      // all that a block may have, less `Exchange`
constexpr int kVocabularyTooLarge = -1, kBadArgument = -2;    // beside CUDA's own codes, which are positive

struct Plan {
    int blocks;   // of a cluster
    int threads;  // of a block
    int slots;    // of a block, at most
};

// Returns 0 or an error code. `slots_wanted` is kSlotsOfThree; tests take fewer, for large clusters over short rows.
template <typename T>
int plan_row(int64_t vocabulary, int64_t slots_wanted, Plan* plan) {
    constexpr int64_t kPerVector = Element<T>::kPerVector;
    if (vocabulary < 1) return kBadArgument;
    if (vocabulary > kBlocks * kSlotsOfOne * kPerVector) return kVocabularyTooLarge;
    const int64_t vectors = (vocabulary + 2 * kPerVector - 2) / kPerVector;  // wherever the row begins within a vector
    for (int blocks = 1;; blocks *= 2) {
        int64_t slots = (vectors + blocks - 1) / blocks;
        if (blocks > 1) slots = (slots + 7) / 8 * 8;  // whole 128-byte lines, so that no two blocks share one
        if (slots > slots_wanted && blocks < kBlocks) continue;
        if (slots > kSlotsOfOne) return kVocabularyTooLarge;
        const int64_t warps = (slots + 8 * kWarp - 1) / (8 * kWarp);  // eight slots a thread, until the block is full
        *plan = {blocks, static_cast<int>(warps < kThreads / kWarp ? warps : kThreads / kWarp) * kWarp,
                 static_cast<int>(slots)};
        return 0;
    }
}

inline const char* refusal(int code) {
    return code == kVocabularyTooLarge ? "a row does not fit the shared memory of eight blocks" : "impossible argument";
}

// values[3]: blocks of a cluster, threads of a block, bytes of a block's slice.
inline int describe_plan(int64_t vocabulary, int dtype, int64_t slots_wanted, int64_t* values) {
    Plan plan;
    if (dtype < 0 || dtype > 1) return kBadArgument;
    const int refused = dtype == 0 ? plan_row<float>(vocabulary, slots_wanted, &plan)
                                   : plan_row<Bfloat16>(vocabulary, slots_wanted, &plan);
    if (refused) return refused;
    values[0] = plan.blocks;
    values[1] = plan.threads;
    values[2] = static_cast<int64_t>(plan.slots) * static_cast<int64_t>(sizeof(Vector));
    return 0;
}

}  // namespace megaprior
