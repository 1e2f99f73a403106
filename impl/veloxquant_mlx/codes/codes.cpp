// Native path of the entropy code: interleaved rANS and quantization against its tables, the hot loops of codes/*.py.
//
// The format's definition is veloxquant_kernels/rans_decode.metal; rans_decode.py beside it has the same in NumPy, and
// tests hold all three equal. Every read of a block's words is bounded by the block's end, whatever the words say.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define VQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kLow = 1u << 16;
constexpr uint64_t kTailLimit = (uint64_t(1) << 32) - kLow;
constexpr uint16_t kInactive = 0xFFFF;
constexpr int kMaxTokens = 256;
constexpr int kMaxTail = 65535;

const uint8_t kNext4[4][2] = {NEXT4};
const uint8_t kNext8[8][2] = {NEXT8};
}  // namespace
