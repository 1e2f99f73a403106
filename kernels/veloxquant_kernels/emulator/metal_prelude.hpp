// The part of metal_stdlib that the kernels use, in C++14, for the CPU emulator.
//
// Stricter than Metal where Metal's implementations differ or conversions hide rounding: float to half or bfloat is
// explicit. Address spaces are checked by the lint pass, not here; see build.py for threadgroup declarations.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "runtime.h"

#define kernel
#define device
#define constant
#define thread
#define threadgroup
#define METAL_FUNC inline
#define VQ_NO_CHECKS __attribute__((noinline, no_sanitize("thread")))

// build.py turns "threadgroup T name[count];" into this: C++ has no storage shared by the fibers of a threadgroup.
#define VQ_THREADGROUP(T, name, count) \
  T* const name = static_cast<T*>(vq_threadgroup_array(#name, sizeof(T) * (count), alignof(T) < 16 ? 16 : alignof(T)));

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX half(65504.0f)
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

namespace vq {

template <bool Condition, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <typename T> struct is_integer { static const bool value = false; };
#define VQ_INTEGER(T) template <> struct is_integer<T> { static const bool value = true; };
VQ_INTEGER(bool) VQ_INTEGER(char) VQ_INTEGER(signed char) VQ_INTEGER(uchar) VQ_INTEGER(short) VQ_INTEGER(ushort)
VQ_INTEGER(int) VQ_INTEGER(uint) VQ_INTEGER(long) VQ_INTEGER(ulong) VQ_INTEGER(long long)
VQ_INTEGER(unsigned long long)
#undef VQ_INTEGER

template <typename To, typename From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline uint16_t float_to_half(float value) {  // round to nearest, ties to even
  uint32_t x = bit_cast<uint32_t>(value), sign = (x >> 16) & 0x8000u;
  x &= 0x7fffffffu;
  if (x > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (x >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (x < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    uint32_t shifted = bit_cast<uint32_t>(bit_cast<float>(x) + 0.5f);
    return uint16_t(sign | (shifted - 0x3f000000u));
  }
  x += 0xfffu + ((x >> 13) & 1u);
  return uint16_t(sign | ((x - 0x38000000u) >> 13));
}

inline float half_to_float(uint16_t bits) {
  uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x400u) return bit_cast<float>(sign | bit_cast<uint32_t>(float(rest) * 5.9604644775390625e-8f));
  return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t x = bit_cast<uint32_t>(value);
  if ((x & 0x7fffffffu) > 0x7f800000u) return uint16_t((x >> 16) | 0x40u);
  return uint16_t((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
}

inline float bfloat_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

}  // namespace vq

// Arithmetic between two of a kind rounds to that kind after every operation; with a float it is done in float.
#define VQ_SMALL_FLOAT(name, encode, decode)                                                                    \
  struct name {                                                                                                 \
    uint16_t bits;                                                                                              \
    name() = default;                                                                                           \
    explicit name(float value) : bits(vq::encode(value)) {}                                                     \
    template <typename I, typename = typename vq::enable_if<vq::is_integer<I>::value>::type>                    \
    explicit name(I value) : bits(vq::encode(float(value))) {}                                                  \
    operator float() const { return vq::decode(bits); }                                                         \
    name& operator+=(name other) { return *this = name(float(*this) + float(other)); }                          \
    name& operator-=(name other) { return *this = name(float(*this) - float(other)); }                          \
    name& operator*=(name other) { return *this = name(float(*this) * float(other)); }                          \
    name& operator/=(name other) { return *this = name(float(*this) / float(other)); }                          \
  };                                                                                                            \
  inline name operator+(name a, name b) { return name(float(a) + float(b)); }                                   \
  inline name operator-(name a, name b) { return name(float(a) - float(b)); }                                   \
  inline name operator*(name a, name b) { return name(float(a) * float(b)); }                                   \
  inline name operator/(name a, name b) { return name(float(a) / float(b)); }                                   \
  inline name operator-(name a) { return vq::bit_cast<name>(uint16_t(a.bits ^ 0x8000u)); }
VQ_SMALL_FLOAT(half, float_to_half, half_to_float)
VQ_SMALL_FLOAT(bfloat, float_to_bfloat, bfloat_to_float)
#undef VQ_SMALL_FLOAT
typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal {

template <typename To, typename From> inline To as_type(From from) { return vq::bit_cast<To>(from); }

// ---- vectors ------------------------------------------------------------------------------------------------------

template <typename T, int N> struct vec;
template <typename T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  explicit vec(T all) : x(all), y(all) {}
  vec(T x_, T y_) : x(x_), y(y_) {}
  T& operator[](int i) { return (&x)[i]; }
  T operator[](int i) const { return (&x)[i]; }
};
template <typename T> struct alignas(4 * sizeof(T)) vec<T, 3> {  // takes the room of four, as in Metal
  T x, y, z;
  vec() = default;
  explicit vec(T all) : x(all), y(all), z(all) {}
  vec(T x_, T y_, T z_) : x(x_), y(y_), z(z_) {}
  T& operator[](int i) { return (&x)[i]; }
  T operator[](int i) const { return (&x)[i]; }
};
template <typename T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  explicit vec(T all) : x(all), y(all), z(all), w(all) {}
  vec(T x_, T y_, T z_, T w_) : x(x_), y(y_), z(z_), w(w_) {}
  T& operator[](int i) { return (&x)[i]; }
  T operator[](int i) const { return (&x)[i]; }
};

#define VQ_VECTOR_OPERATOR(op)                                                                                  \
  template <typename T, int N> inline vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                         \
    for (int i = 0; i < N; ++i) a[i] = T(a[i] op b[i]);                                                         \
    return a;                                                                                                   \
  }                                                                                                             \
  template <typename T, int N> inline vec<T, N> operator op(vec<T, N> a, T b) { return a op vec<T, N>(b); }     \
  template <typename T, int N> inline vec<T, N> operator op(T a, vec<T, N> b) { return vec<T, N>(a) op b; }     \
  template <typename T, int N> inline vec<T, N>& operator op##=(vec<T, N>& a, vec<T, N> b) { return a = a op b; }
VQ_VECTOR_OPERATOR(+)
VQ_VECTOR_OPERATOR(-)
VQ_VECTOR_OPERATOR(*)
VQ_VECTOR_OPERATOR(/)
VQ_VECTOR_OPERATOR(&)
VQ_VECTOR_OPERATOR(|)
VQ_VECTOR_OPERATOR(^)
VQ_VECTOR_OPERATOR(<<)
VQ_VECTOR_OPERATOR(>>)
#undef VQ_VECTOR_OPERATOR

template <typename T, int N> inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(a[0] * b[0]);
  for (int i = 1; i < N; ++i) sum += T(a[i] * b[i]);
  return sum;
}

#define VQ_VECTORS(T, name) \
  typedef vec<T, 2> name##2; typedef vec<T, 3> name##3; typedef vec<T, 4> name##4;
VQ_VECTORS(float, float)
VQ_VECTORS(half, half)
VQ_VECTORS(bfloat, bfloat)
VQ_VECTORS(char, char)
VQ_VECTORS(uchar, uchar)
VQ_VECTORS(short, short)
VQ_VECTORS(ushort, ushort)
VQ_VECTORS(int, int)
VQ_VECTORS(uint, uint)
#undef VQ_VECTORS

// ---- numbers ------------------------------------------------------------------------------------------------------

template <typename T> struct numeric_limits;
#define VQ_LIMITS(T, smallest, lowest_, largest, epsilon_, infinity_) \
  template <> struct numeric_limits<T> {                              \
    static T min() { return T(smallest); }                            \
    static T lowest() { return T(lowest_); }                          \
    static T max() { return T(largest); }                             \
    static T epsilon() { return T(epsilon_); }                        \
    static T infinity() { return T(infinity_); }                      \
  };
VQ_LIMITS(float, FLT_MIN, -FLT_MAX, FLT_MAX, FLT_EPSILON, INFINITY)
VQ_LIMITS(half, 6.103515625e-5f, -65504.0f, 65504.0f, 9.765625e-4f, INFINITY)
VQ_LIMITS(bfloat, FLT_MIN, -3.3895314e38f, 3.3895314e38f, 7.8125e-3f, INFINITY)
VQ_LIMITS(int, -2147483647 - 1, -2147483647 - 1, 2147483647, 0, 0)
VQ_LIMITS(uint, 0, 0, 4294967295u, 0, 0)
#undef VQ_LIMITS

#define VQ_UNARY(name, builtin)                                                   \
  inline float name(float x) { return builtin(x); }                               \
  inline half name(half x) { return half(builtin(float(x))); }                    \
  inline bfloat name(bfloat x) { return bfloat(builtin(float(x))); }
inline float vq_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float vq_sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
VQ_UNARY(exp, __builtin_expf)
VQ_UNARY(exp2, __builtin_exp2f)
VQ_UNARY(log, __builtin_logf)
VQ_UNARY(log2, __builtin_log2f)
VQ_UNARY(sqrt, __builtin_sqrtf)
VQ_UNARY(rsqrt, vq_rsqrt)
VQ_UNARY(sign, vq_sign)
VQ_UNARY(sin, __builtin_sinf)
VQ_UNARY(cos, __builtin_cosf)
VQ_UNARY(tanh, __builtin_tanhf)
VQ_UNARY(floor, __builtin_floorf)
VQ_UNARY(ceil, __builtin_ceilf)
VQ_UNARY(trunc, __builtin_truncf)
VQ_UNARY(rint, __builtin_rintf)
VQ_UNARY(round, __builtin_roundf)
VQ_UNARY(fabs, __builtin_fabsf)
#undef VQ_UNARY
inline float abs(float x) { return __builtin_fabsf(x); }
inline half abs(half x) { return fabs(x); }
inline bfloat abs(bfloat x) { return fabs(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float pow(float a, float b) { return __builtin_powf(a, b); }
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
inline float fmin(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
template <typename T> inline T max(T a, T b) { return a < b ? b : a; }
template <typename T> inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <typename T> inline T select(T a, T b, bool condition) { return condition ? b : a; }
inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32u; }
inline uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32u; }
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : (x >> offset) & (bits >= 32 ? ~0u : (1u << bits) - 1u);
}
inline uint insert_bits(uint base, uint insert, uint offset, uint bits) {
  uint mask = (bits >= 32 ? ~0u : (1u << bits) - 1u) << offset;
  return (base & ~mask) | ((insert << offset) & mask);
}
namespace precise { using metal::exp; using metal::exp2; using metal::log; using metal::sqrt; using metal::rsqrt; }
namespace fast { using metal::exp; using metal::exp2; using metal::log; using metal::sqrt; using metal::rsqrt; }

// ---- barriers -----------------------------------------------------------------------------------------------------

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  vq_threadgroup_barrier(uint(flags), line);
  __asm__ volatile("" ::: "memory");
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  vq_simd(VQ_SIMD_BARRIER, VQ_UINT, 0, uint(flags), line);
  __asm__ volatile("" ::: "memory");
}

// ---- SIMD-group functions -----------------------------------------------------------------------------------------

}  // namespace metal

namespace vq {

template <typename T> struct Simd;  // how a value travels through a reduction
template <> struct Simd<float> {
  enum { type = VQ_FLOAT };
  static uint64_t out(float x) { return bit_cast<uint32_t>(x); }
  static float in(uint64_t bits) { return bit_cast<float>(uint32_t(bits)); }
};
template <> struct Simd<half> {
  enum { type = VQ_FLOAT };
  static uint64_t out(half x) { return bit_cast<uint32_t>(float(x)); }
  static half in(uint64_t bits) { return half(bit_cast<float>(uint32_t(bits))); }
};
template <> struct Simd<bfloat> {
  enum { type = VQ_FLOAT };
  static uint64_t out(bfloat x) { return bit_cast<uint32_t>(float(x)); }
  static bfloat in(uint64_t bits) { return bfloat(bit_cast<float>(uint32_t(bits))); }
};
#define VQ_SIMD_INTEGER(T, code)                           \
  template <> struct Simd<T> {                             \
    enum { type = code };                                  \
    static uint64_t out(T x) { return uint32_t(x); }       \
    static T in(uint64_t bits) { return T(uint32_t(bits)); } \
  };
VQ_SIMD_INTEGER(int, VQ_INT)
VQ_SIMD_INTEGER(short, VQ_INT)
VQ_SIMD_INTEGER(uint, VQ_UINT)
VQ_SIMD_INTEGER(ushort, VQ_UINT)
VQ_SIMD_INTEGER(uchar, VQ_UINT)
#undef VQ_SIMD_INTEGER

template <typename T> inline T reduce(int operation, T value, int line) {
  return Simd<T>::in(vq_simd(operation, Simd<T>::type, Simd<T>::out(value), 0, line));
}
template <typename T> struct Move {  // a shuffle moves bits
  static T of(int operation, T value, uint argument, int line) {
    static_assert(sizeof(T) <= 8, "shuffles move at most eight bytes at once");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = vq_simd(operation, VQ_UINT, bits, argument, line);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
  }
};
template <typename T, int N> struct Move<metal::vec<T, N>> {
  static metal::vec<T, N> of(int operation, metal::vec<T, N> value, uint argument, int line) {
    for (int i = 0; i < N; ++i) value[i] = Move<T>::of(operation, value[i], argument, line);
    return value;
  }
};

}  // namespace vq

namespace metal {

#define VQ_REDUCTION(name, operation) \
  template <typename T> inline T name(T x, int line = __builtin_LINE()) { return vq::reduce(operation, x, line); }
VQ_REDUCTION(simd_sum, VQ_SUM)
VQ_REDUCTION(simd_product, VQ_PRODUCT)
VQ_REDUCTION(simd_max, VQ_MAX)
VQ_REDUCTION(simd_min, VQ_MIN)
VQ_REDUCTION(simd_and, VQ_AND)
VQ_REDUCTION(simd_or, VQ_OR)
VQ_REDUCTION(simd_xor, VQ_XOR)
VQ_REDUCTION(simd_prefix_inclusive_sum, VQ_PREFIX_INCLUSIVE_SUM)
VQ_REDUCTION(simd_prefix_exclusive_sum, VQ_PREFIX_EXCLUSIVE_SUM)
#undef VQ_REDUCTION
#define VQ_SHUFFLE_FUNCTION(name, operation)                                     \
  template <typename T> inline T name(T x, ushort lane, int line = __builtin_LINE()) { \
    return vq::Move<T>::of(operation, x, lane, line);                            \
  }
VQ_SHUFFLE_FUNCTION(simd_shuffle, VQ_SHUFFLE)
VQ_SHUFFLE_FUNCTION(simd_broadcast, VQ_SHUFFLE)
VQ_SHUFFLE_FUNCTION(simd_shuffle_xor, VQ_SHUFFLE_XOR)
VQ_SHUFFLE_FUNCTION(simd_shuffle_down, VQ_SHUFFLE_DOWN)
VQ_SHUFFLE_FUNCTION(simd_shuffle_up, VQ_SHUFFLE_UP)
#undef VQ_SHUFFLE_FUNCTION
template <typename T> inline T simd_broadcast_first(T x, int line = __builtin_LINE()) {
  return vq::Move<T>::of(VQ_BROADCAST_FIRST, x, 0, line);
}
inline uint64_t simd_ballot(bool vote, int line = __builtin_LINE()) {
  return vq_simd(VQ_BALLOT, VQ_UINT, vote, 0, line);
}
inline bool simd_any(bool vote, int line = __builtin_LINE()) { return vq_simd(VQ_OR, VQ_UINT, vote, 0, line) != 0; }
inline bool simd_all(bool vote, int line = __builtin_LINE()) { return vq_simd(VQ_AND, VQ_UINT, vote, 0, line) != 0; }

// ---- atomics: one fiber runs at a time, so a plain read-modify-write is atomic ---------------------------------------

enum memory_order { memory_order_relaxed };
template <typename T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

#define VQ_ATOMIC(name, expression)                                                              \
  template <typename T> VQ_NO_CHECKS T name(atomic<T>* object, T operand, memory_order) {        \
    vq_atomic_access(object, sizeof(T), 1, 1);                                                         \
    T old = object->value;                                                                       \
    object->value = expression;                                                                  \
    return old;                                                                                  \
  }
VQ_ATOMIC(atomic_exchange_explicit, operand)
VQ_ATOMIC(atomic_fetch_add_explicit, T(old + operand))
VQ_ATOMIC(atomic_fetch_sub_explicit, T(old - operand))
VQ_ATOMIC(atomic_fetch_max_explicit, old < operand ? operand : old)
VQ_ATOMIC(atomic_fetch_min_explicit, operand < old ? operand : old)
VQ_ATOMIC(atomic_fetch_and_explicit, T(old & operand))
VQ_ATOMIC(atomic_fetch_or_explicit, T(old | operand))
VQ_ATOMIC(atomic_fetch_xor_explicit, T(old ^ operand))
#undef VQ_ATOMIC
template <typename T> VQ_NO_CHECKS void atomic_store_explicit(atomic<T>* object, T operand, memory_order) {
  vq_atomic_access(object, sizeof(T), 0, 1);
  object->value = operand;
}
template <typename T> VQ_NO_CHECKS T atomic_load_explicit(const atomic<T>* object, memory_order) {
  vq_atomic_access(object, sizeof(T), 1, 0);
  return object->value;
}
template <typename T>
VQ_NO_CHECKS bool atomic_compare_exchange_weak_explicit(atomic<T>* object, T* expected, T desired, memory_order,
                                                        memory_order) {
  vq_atomic_access(object, sizeof(T), 1, 1);
  if (object->value == *expected) {
    object->value = desired;
    return true;
  }
  *expected = object->value;
  return false;
}

}  // namespace metal

using namespace metal;

#ifdef VQ_COVERAGE  // gcov writes its counts at exit, or when asked
extern "C" void __gcov_dump(void);
extern "C" void __gcov_reset(void);
extern "C" __attribute__((visibility("default"))) void vq_write_coverage() {
  __gcov_dump();
  __gcov_reset();
}
#endif

namespace vq {
VQ_NO_CHECKS inline uint3 triple(const uint32_t ids[3]) { return uint3(ids[0], ids[1], ids[2]); }
}  // namespace vq
