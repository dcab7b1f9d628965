// Token-weighted cross entropy of given logits for compute capability 9.0: one kernel, one row per cluster of blocks.
//
// Traffic: every logit is read from device memory once and every gradient written once, over the logits. That is the floor
// of any kernel that takes logits and gives gradients: at N = 8,192 rows, V = 128,256 in bfloat16, 2.1 GB each way, 0.98 ms
// at 4.3 TB/s. A kernel without clusters cannot keep such a row (256 KB) on the chip and reads it twice (1.47 ms). The two
// exponentials per logit, one for the sum and one for the gradient, take 0.57 ms of the special-function units, under the
// copying as long as several blocks are resident on each multiprocessor. These are predictions, not measurements.
//
// The C interface is at the end. It knows nothing of torch; kernels/cuda_rows.py calls it through ctypes.
#include <cuda_runtime.h>

#include "rows.h"

namespace megaprior {

struct Gpu {
    __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
    __device__ __forceinline__ int threads() const { return static_cast<int>(blockDim.x); }
    __device__ __forceinline__ int rank() const { return static_cast<int>(__clusterRelativeBlockRank()); }
    __device__ __forceinline__ int blocks() const { return static_cast<int>(__clusterSizeInBlocks()); }
    __device__ __forceinline__ int64_t row() const { return __clusterIdx().x; }
    __device__ __forceinline__ int64_t block() const { return blockIdx.x; }
    __device__ __forceinline__ int64_t grid() const { return gridDim.x; }

    __device__ __forceinline__ Vector* slots() const {
        extern __shared__ Vector dynamic_slots[];
        return dynamic_slots;
    }
    __device__ __forceinline__ Exchange* exchange() const {
        static __shared__ Exchange of_block;
        return &of_block;
    }
    __device__ __forceinline__ Exchange* exchange_of(int rank) const {
        return static_cast<Exchange*>(__cluster_map_shared_rank(exchange(), static_cast<unsigned>(rank)));
    }

    // Every barrier clobbers memory: without that the compiler may move reads of shared memory across it.
    __device__ __forceinline__ void block_barrier() const { __syncthreads(); }
    __device__ __forceinline__ void warp_barrier() const { __syncwarp(); }
    __device__ __forceinline__ void cluster_arrive() const {  // says "started", publishes nothing
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    }
    __device__ __forceinline__ void cluster_arrive_release() const {
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    }
    __device__ __forceinline__ void cluster_wait() const {
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
    __device__ __forceinline__ float shuffle(float value, int mask) const {
        return __shfl_xor_sync(0xffffffffu, value, mask);
    }

    // Past the first-level cache and the registers, straight into shared memory.
    __device__ __forceinline__ void copy(Vector* to, const void* from) const {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         static_cast<unsigned>(__cvta_generic_to_shared(to))),
                     "l"(__cvta_generic_to_global(from))
                     : "memory");
    }
    __device__ __forceinline__ void wait_for_copies() const { asm volatile("cp.async.wait_all;" ::: "memory"); }

    __device__ __forceinline__ Vector load(const void* from) const {
        const uint4 value = __ldcs(static_cast<const uint4*>(from));
        return {{value.x, value.y, value.z, value.w}};
    }
    __device__ __forceinline__ void store(void* to, const Vector& value) const {  // streaming: nothing here reads it again
        __stcs(static_cast<uint4*>(to), make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]));
    }
};

// 512 threads, three blocks: at 64 KB per slice three blocks fit a multiprocessor's shared memory, one computing while
// the others wait for memory, and 16 warps of the one that computes keep the special-function units fed. Three blocks of
// 512 threads leave 42 registers a thread; the bodies fit without spilling.
#define MEGAPRIOR_ROWS __global__ void __launch_bounds__(kThreads, 3)
#define MEGAPRIOR_SCALE __global__ void __launch_bounds__(kScaleThreads, 4)

extern "C" {
MEGAPRIOR_ROWS cross_entropy_rows_fp32(const __grid_constant__ Job<float> job) { cross_entropy_row(Gpu{}, job); }
MEGAPRIOR_ROWS cross_entropy_rows_bf16(const __grid_constant__ Job<Bfloat16> job) { cross_entropy_row(Gpu{}, job); }
MEGAPRIOR_SCALE scale_fp32(const __grid_constant__ ScaleJob<float> job) { scale_rows(Gpu{}, job); }
MEGAPRIOR_SCALE scale_bf16(const __grid_constant__ ScaleJob<Bfloat16> job) { scale_rows(Gpu{}, job); }
}

constexpr int64_t kLargestGrid = 0x7fffffff;

cudaLaunchConfig_t launch_config(int64_t blocks, int threads, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    return config;
}

// An error that was reported here must not be found again by whoever asks the runtime for its last error next.
int reported(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

template <typename T>
int launch_rows(void (*kernel)(Job<T>), Job<T> job, int64_t rows, cudaStream_t stream) {
    Plan plan;
    if (const int refused = plan_row<T>(job.vocabulary, kSlotsOfThree, &plan)) return refused;
    if (rows > kLargestGrid / plan.blocks) return kBadArgument;
    job.slots = plan.slots;

    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(kSlotsOfOne * sizeof(Vector)));
    // The driver would else be free to leave just enough shared memory for one block.
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return reported(error);

    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = launch_config(rows * plan.blocks, plan.threads, stream);
    config.dynamicSmemBytes = plan.slots * sizeof(Vector);
    config.attrs = &cluster;
    config.numAttrs = 1;
    return reported(cudaLaunchKernelEx(&config, kernel, job));
}

// A grid that fills the device once and walks over the rows: one that covered them block by block would spend longer on
// starting blocks that return at once than the usual scale of 1 may cost.
template <typename T>
int launch_scale(void (*kernel)(ScaleJob<T>), ScaleJob<T> job, cudaStream_t stream) {
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return reported(error);
    job.pieces = scale_pieces<T>(job.columns);
    const int64_t pieces = job.rows * job.pieces, resident = 4 * static_cast<int64_t>(processors);
    const cudaLaunchConfig_t config = launch_config(pieces < resident ? pieces : resident, kScaleThreads, stream);
    return reported(cudaLaunchKernelEx(&config, kernel, job));
}

}  // namespace megaprior

// Every function returns 0, a positive cudaError_t or one of rows.h's negative codes, and waits for nothing. dtype: 0 is
// float32, 1 is bfloat16. Pointers lie on the current device; rows may begin at any element.
extern "C" {

// Row i of logits (rows, vocabulary), row_stride elements apart, with t = targets[i]:
//   t < 0            nll[i] = 0; the row becomes zeros if `gradient`
//   else             nll[i] = -log softmax(x)[t]; if `gradient`, x <- factor[i] * (softmax(x) - onehot(t)), and exact zeros
//                    where factor[i] is 0, whatever the row holds. t >= vocabulary makes nll[i] and the row NaN.
// Without `gradient` the logits are not written, and factor is not read.
int megaprior_cross_entropy_rows(void* logits, int dtype, int64_t rows, int64_t vocabulary, int64_t row_stride,
                                 const int64_t* targets, const float* factor, float* nll, int gradient, void* stream) {
    using namespace megaprior;
    if (rows == 0) return 0;
    if (rows < 0 || dtype < 0 || dtype > 1) return kBadArgument;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (dtype == 0) {
        return launch_rows(cross_entropy_rows_fp32, Job<float>{static_cast<float*>(logits), vocabulary, row_stride, targets,
                                                               factor, nll, 0, gradient != 0}, rows, queue);
    }
    return launch_rows(cross_entropy_rows_bf16, Job<Bfloat16>{static_cast<Bfloat16*>(logits), vocabulary, row_stride,
                                                              targets, factor, nll, 0, gradient != 0}, rows, queue);
}

// values (rows, columns), row_stride elements apart, *= *scale. Nothing is touched where *scale is 1.
int megaprior_scale(void* values, int dtype, int64_t rows, int64_t columns, int64_t row_stride, const float* scale,
                    void* stream) {
    using namespace megaprior;
    if (rows == 0 || columns == 0) return 0;
    if (rows < 0 || columns < 0 || columns > 0x7fff0000 || dtype < 0 || dtype > 1) return kBadArgument;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (dtype == 0) {
        return launch_scale(scale_fp32, ScaleJob<float>{static_cast<float*>(values), rows, columns, row_stride, scale, 0},
                            queue);
    }
    return launch_scale(
        scale_bf16, ScaleJob<Bfloat16>{static_cast<Bfloat16*>(values), rows, columns, row_stride, scale, 0}, queue);
}

// plan[3] = blocks of a cluster, threads of a block, bytes of a block's slice in shared memory.
int megaprior_plan(int64_t vocabulary, int dtype, int64_t* plan) {
    using namespace megaprior;
    return describe_plan(vocabulary, dtype, kSlotsOfThree, plan);
}

const char* megaprior_error(int code) {
    if (code >= 0) return cudaGetErrorString(static_cast<cudaError_t>(code));
    return megaprior::refusal(code);
}

// Of the sources that this library was built from: an older build beside newer sources must not be used.
const char* megaprior_source() { return MEGAPRIOR_SOURCE; }
}
