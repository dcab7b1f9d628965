// The kernels' bodies on a CPU, for tests: the same C interface as weighted_cross_entropy.cu, over memory of the host.
//
// Every thread of a cluster is a coroutine with a stack of its own. One runs until it meets a barrier; which of those that
// may go on comes next is drawn at random. So a barrier that is missing shows as a wrong result under some seed, and:
// - shared memory starts as NaN, and an asynchronous copy arrives only when its own thread waits for it;
// - a write into a block that has not started or has ended, a copy or store that leaves the row or is not 16-byte aligned,
//   and a barrier that not everybody reaches are errors.
// What this cannot show: that the hardware's barriers do what their names say, and anything about time.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "rows.h"

namespace megaprior {
namespace {

constexpr int kBrokenRule = -100;
constexpr size_t kStack = 32 * 1024;

uint64_t seed_of_next_call = 0;
int64_t slots_wanted = kSlotsOfThree;

struct Barrier {
    int members = 0, arrived = 0, generation = 0;
    void arrive() {
        if (++arrived == members) {
            arrived = 0;
            ++generation;
        }
    }
};

struct Block {
    std::vector<Vector> slots;
    Exchange exchange;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::vector<float> shuffled;  // one value a thread
    int started = 0, ended = 0;   // threads
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Block* block;
    int rank, index;
    const Barrier* waits_for = nullptr;  // at `generation`, until the barrier has another one
    int generation = 0;
    int cluster_generation = -1;  // of the cluster's barrier when this thread arrived there; -1 between wait and arrive
    std::vector<std::pair<Vector*, const void*>> copies;
    bool ended = false;
};

struct Cluster {
    std::vector<Block> blocks;
    std::vector<Thread> threads;
    Barrier barrier;
    int64_t row = 0;
    uintptr_t row_begin = 0, row_end = 0;
    const char* broken = nullptr;  // exceptions must not cross a switch of stacks
};

Cluster* cluster;
Thread* running;
ucontext_t scheduler;
void (*body)();

void demand(bool holds, const char* rule) {
    if (!holds && !cluster->broken) cluster->broken = rule;
}

void wait_for(const Barrier& barrier, int generation) {
    if (barrier.generation != generation) return;
    running->waits_for = &barrier;
    running->generation = generation;
    swapcontext(&running->context, &scheduler);
}

void sync(Barrier& barrier) {
    const int generation = barrier.generation;
    barrier.arrive();
    wait_for(barrier, generation);
}

struct Cpu {
    int thread() const { return running->index; }
    int threads() const { return static_cast<int>(running->block->shuffled.size()); }
    int rank() const { return running->rank; }
    int blocks() const { return static_cast<int>(cluster->blocks.size()); }
    int64_t row() const { return cluster->row; }
    Vector* slots() const { return running->block->slots.data(); }
    Exchange* exchange() const { return &running->block->exchange; }
    Exchange* exchange_of(int rank) const {
        Block& block = cluster->blocks[static_cast<size_t>(rank)];
        demand(block.started == threads() && block.ended == 0, "another block's memory while that block is not running");
        return &block.exchange;
    }
    void block_barrier() const { sync(running->block->barrier); }
    void warp_barrier() const { sync(running->block->warps[static_cast<size_t>(running->index / kWarp)]); }
    void cluster_arrive() const {
        demand(running->cluster_generation < 0, "an arrival at the cluster's barrier without a wait after the last one");
        running->cluster_generation = cluster->barrier.generation;
        cluster->barrier.arrive();
    }
    void cluster_arrive_release() const { cluster_arrive(); }
    void cluster_wait() const {
        demand(running->cluster_generation >= 0, "a wait at the cluster's barrier without an arrival");
        wait_for(cluster->barrier, running->cluster_generation);
        running->cluster_generation = -1;
    }
    float shuffle(float value, int mask) const {
        std::vector<float>& values = running->block->shuffled;
        values[static_cast<size_t>(running->index)] = value;
        warp_barrier();
        const float other = values[static_cast<size_t>(running->index ^ mask)];
        warp_barrier();
        return other;
    }
    static void check(const void* place) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(place);
        demand(at % 16 == 0 && at >= cluster->row_begin && at + 16 <= cluster->row_end, "a vector that leaves its row");
    }
    void copy(Vector* to, const void* from) const {
        check(from);
        running->copies.emplace_back(to, from);
    }
    void wait_for_copies() const {
        for (const auto& copy : running->copies) std::memcpy(copy.first, copy.second, sizeof(Vector));
        running->copies.clear();
    }
    void store(void* to, const Vector& value) const {
        check(to);
        std::memcpy(to, &value, sizeof value);
    }
};

void run_thread() {
    ++running->block->started;
    body();
    demand(running->copies.empty(), "a copy that nobody waited for");
    demand(running->cluster_generation < 0, "an end between an arrival at the cluster's barrier and the wait");
    ++running->block->ended;
    running->ended = true;
    swapcontext(&running->context, &scheduler);
}

void schedule(std::mt19937_64& random) {
    std::vector<Thread*> alive;
    for (Thread& thread : cluster->threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStack;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
        alive.push_back(&thread);
    }
    while (!alive.empty() && !cluster->broken) {
        std::shuffle(alive.begin(), alive.end(), random);
        bool moved = false;
        for (Thread* thread : alive) {
            if (thread->waits_for && thread->waits_for->generation == thread->generation) continue;
            thread->waits_for = nullptr;
            running = thread;
            swapcontext(&scheduler, &thread->context);
            moved = true;
        }
        demand(moved, "a barrier that not everybody reaches");
        std::vector<Thread*> left;
        for (Thread* thread : alive)
            if (!thread->ended) left.push_back(thread);
        alive.swap(left);
    }
}

void start_cluster(Cluster& fresh, const Plan& plan) {
    const size_t width = static_cast<size_t>(plan.threads);
    fresh.blocks = std::vector<Block>(static_cast<size_t>(plan.blocks));
    fresh.threads = std::vector<Thread>(fresh.blocks.size() * width);
    fresh.barrier.members = plan.blocks * plan.threads;
    for (size_t at = 0; at < fresh.threads.size(); ++at) {
        Thread& thread = fresh.threads[at];
        thread.stack.reset(new char[kStack]);
        thread.rank = static_cast<int>(at / width);
        thread.index = static_cast<int>(at % width);
        thread.block = &fresh.blocks[at / width];
    }
    for (Block& block : fresh.blocks) {
        block.slots.resize(static_cast<size_t>(plan.slots));
        std::memset(block.slots.data(), 0xff, block.slots.size() * sizeof(Vector));
        std::memset(static_cast<void*>(&block.exchange), 0xff, sizeof block.exchange);
        block.barrier.members = plan.threads;
        block.warps.resize(width / kWarp);
        for (Barrier& warp : block.warps) warp.members = kWarp;
        block.shuffled.resize(width);
    }
}

template <typename T>
int emulate_rows(Job<T> wanted, int64_t rows) {
    static Job<T> job;
    job = wanted;
    body = [] { cross_entropy_row(Cpu{}, job); };
    Plan plan;
    if (const int refused = plan_row<T>(job.vocabulary, slots_wanted, &plan)) return refused;
    job.slots = plan.slots;
    std::mt19937_64 random(seed_of_next_call);
    for (int64_t row = 0; row < rows; ++row) {
        Cluster fresh;
        cluster = &fresh;
        start_cluster(fresh, plan);
        fresh.row = row;
        fresh.row_begin = reinterpret_cast<uintptr_t>(job.logits + row * job.row_stride);
        fresh.row_end = fresh.row_begin + static_cast<uintptr_t>(job.vocabulary) * sizeof(T);
        schedule(random);
        if (fresh.broken) {
            std::fprintf(stderr, "emulation: %s\n", fresh.broken);
            return kBrokenRule;
        }
    }
    return 0;
}

struct CpuGrid {  // no thread of `scale_rows` waits for another
    int at, width;
    int64_t block_index;
    int thread() const { return at; }
    int64_t block() const { return block_index; }
    int64_t grid() const { return width; }
    Vector load(const void* from) const {
        Vector value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
    void store(void* to, const Vector& value) const { std::memcpy(to, &value, sizeof value); }
};

template <typename T>
int emulate_scale(ScaleJob<T> job) {
    job.pieces = scale_pieces<T>(job.columns);
    constexpr int kGrid = 5;
    for (int64_t block = 0; block < kGrid; ++block)
        for (int thread = 0; thread < kScaleThreads; ++thread) scale_rows(CpuGrid{thread, kGrid, block}, job);
    return 0;
}

}  // namespace
}  // namespace megaprior

extern "C" {

// For the calls that follow: the order of threads, and the slots of a block above which a cluster grows (0: as on a GPU).
void megaprior_emulation(uint64_t seed, int64_t slots) {
    megaprior::seed_of_next_call = seed;
    megaprior::slots_wanted = slots > 0 ? slots : megaprior::kSlotsOfThree;
}

int megaprior_cross_entropy_rows(void* logits, int dtype, int64_t rows, int64_t vocabulary, int64_t row_stride,
                                 const int64_t* targets, const float* factor, float* nll, int gradient, void*) {
    using namespace megaprior;
    if (dtype == 0) {
        return emulate_rows(Job<float>{static_cast<float*>(logits), vocabulary, row_stride, targets, factor, nll, 0,
                                       gradient != 0}, rows);
    }
    return emulate_rows(Job<Bfloat16>{static_cast<Bfloat16*>(logits), vocabulary, row_stride, targets, factor, nll, 0,
                                      gradient != 0}, rows);
}

int megaprior_scale(void* values, int dtype, int64_t rows, int64_t columns, int64_t row_stride, const float* scale, void*) {
    using namespace megaprior;
    if (dtype == 0) return emulate_scale(ScaleJob<float>{static_cast<float*>(values), rows, columns, row_stride, scale, 0});
    return emulate_scale(ScaleJob<Bfloat16>{static_cast<Bfloat16*>(values), rows, columns, row_stride, scale, 0});
}

int megaprior_plan(int64_t vocabulary, int dtype, int64_t* plan) {
    return megaprior::describe_plan(vocabulary, dtype, megaprior::slots_wanted, plan);
}

const char* megaprior_error(int code) {
    return code == megaprior::kBrokenRule ? "the emulated kernel broke a rule (see stderr)" : megaprior::refusal(code);
}

const char* megaprior_source() { return "emulation"; }
}
