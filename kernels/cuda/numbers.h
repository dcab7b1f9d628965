// Elements, 16-byte vectors of them, and how both become float32. Plain C++: a device and a CPU compile the same text.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define MEGAPRIOR_DEVICE __device__ __forceinline__
#define MEGAPRIOR_UNROLL _Pragma("unroll")
#else
#define MEGAPRIOR_DEVICE inline
#define MEGAPRIOR_UNROLL
#endif

namespace megaprior {

struct alignas(16) Vector {
    uint32_t words[4];
};

struct Bfloat16 {
    uint16_t bits;
};

MEGAPRIOR_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

MEGAPRIOR_DEVICE uint32_t bits_of(float value) {
#ifdef __CUDACC__
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

MEGAPRIOR_DEVICE float infinity() { return float_of(0x7f800000u); }
MEGAPRIOR_DEVICE float not_a_number() { return float_of(0x7fc00000u); }

// bfloat16 is the upper half of float32; rounding to it is to nearest, ties to even.
MEGAPRIOR_DEVICE uint32_t bfloat16_bits(float value) {
#ifdef __CUDACC__
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t bits = bits_of(value);
    if (value != value) return 0x7fffu;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#endif
}

MEGAPRIOR_DEVICE uint32_t bfloat16_pair(float low, float high) {
#ifdef __CUDACC__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);  // one instruction for both
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return bfloat16_bits(low) | bfloat16_bits(high) << 16;
#endif
}

template <typename T>
struct Element;

template <>
struct Element<float> {
    static constexpr int kPerVector = 4;

    static MEGAPRIOR_DEVICE float widen(float value) { return value; }
    static MEGAPRIOR_DEVICE float narrow(float value) { return value; }

    static MEGAPRIOR_DEVICE void unpack(const Vector& vector, float (&x)[4]) {
        MEGAPRIOR_UNROLL
        for (int j = 0; j < 4; ++j) x[j] = float_of(vector.words[j]);
    }

    static MEGAPRIOR_DEVICE Vector pack(const float (&x)[4]) {
        return {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}};
    }

    // float32 logits promise float32 results, so the exponential is the accurate one: a row has half as many elements
    // per byte as in bfloat16, which leaves the time for it.
    static MEGAPRIOR_DEVICE float exponential(float x) { return expf(x); }
};

template <>
struct Element<Bfloat16> {
    static constexpr int kPerVector = 8;

    static MEGAPRIOR_DEVICE float widen(Bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
    static MEGAPRIOR_DEVICE Bfloat16 narrow(float value) { return {static_cast<uint16_t>(bfloat16_bits(value))}; }

    static MEGAPRIOR_DEVICE void unpack(const Vector& vector, float (&x)[8]) {
        MEGAPRIOR_UNROLL
        for (int j = 0; j < 4; ++j) {
            x[2 * j] = float_of(vector.words[j] << 16);
            x[2 * j + 1] = float_of(vector.words[j] & 0xffff0000u);
        }
    }

    static MEGAPRIOR_DEVICE Vector pack(const float (&x)[8]) {
        return {{bfloat16_pair(x[0], x[1]), bfloat16_pair(x[2], x[3]), bfloat16_pair(x[4], x[5]),
                 bfloat16_pair(x[6], x[7])}};
    }

    // A few float32 ulps off, against a gradient that keeps 8 bits; below 2^-126 it is 0, which saves the instructions
    // that __expf spends there. x is a logit less the maximum, taken before the factor log2(e) rather than in one fused
    // multiply-add with it: that would lose digits where logits are large.
    static MEGAPRIOR_DEVICE float exponential(float x) {
#ifdef __CUDACC__
        float power;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
        return power;
#else
        return expf(x);
#endif
    }
};

}  // namespace megaprior
