// Intel AMX: tiles of 16 x 64 bytes, and tdpbsud, which multiplies 16 tokens by 16 rows of 64 inputs. Everything else
// is AVX-512 with VNNI. `amx-portable` computes the same with plain arrays, so that every machine with AVX-512 tests
// all of this file but the six instructions.
#include <immintrin.h>

#include "kernels.h"

namespace llamita {
namespace {

#include "avx512.inc"

constexpr size_t kTiles = 8;

struct alignas(64) TileShapes {  // as ldtilecfg reads it
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

// In assembly: the intrinsics take no template arguments, and GCC 12's say neither that ldtilecfg reads 64 bytes nor
// that tiles are loaded from memory that was written before.
struct AmxTiles {
  explicit AmxTiles(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
  ~AmxTiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int T>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  void load(const void* from, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void store(int32_t (&to)[16][16]) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(sizeof to[0]), "i"(T) : "memory");
  }
  template <int C, int A, int B>  // C += A (signed) * B (unsigned)
  void dot() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

// The same by Intel's description of each instruction. What an instruction would refuse ends the program.
struct PortableTiles {
  explicit PortableTiles(const TileShapes& s) : shapes(s) {}

  template <int T>
  void zero() {
    __builtin_memset(tiles[T], 0, sizeof tiles[T]);
  }
  template <int T>
  void load(const void* from, size_t stride) {
    zero<T>();
    for (size_t r = 0; r < shapes.rows[T]; r++)
      __builtin_memcpy(tiles[T][r], static_cast<const uint8_t*>(from) + r * stride, shapes.row_bytes[T]);
  }
  template <int T>
  void store(int32_t (&to)[16][16]) {
    for (size_t r = 0; r < shapes.rows[T]; r++) __builtin_memcpy(to[r], tiles[T][r], shapes.row_bytes[T]);
  }
  template <int C, int A, int B>
  void dot() {
    if (shapes.rows[A] != shapes.rows[C] || shapes.row_bytes[B] != shapes.row_bytes[C] ||
        shapes.row_bytes[A] != 4 * shapes.rows[B])
      __builtin_trap();
    for (size_t m = 0; m < shapes.rows[C]; m++) {
      int32_t sums[16];
      __builtin_memcpy(sums, tiles[C][m], sizeof sums);
      for (size_t k = 0; k < shapes.row_bytes[A]; k++) {
        const int32_t x = static_cast<int8_t>(tiles[A][m][k]);
        for (size_t n = 0; n < 16; n++) sums[n] += x * tiles[B][k / 4][4 * n + k % 4];
      }
      __builtin_memcpy(tiles[C][m], sums, sizeof sums);
    }
  }

  TileShapes shapes;
  uint8_t tiles[kTiles][16][64];
};

#include "tiles.inc"

// ---- probe -------------------------------------------------------------------------------------------------------
// 2 x 2 tiles of sums, as many as there are beside two of activations and two of weights.
double tile_probe(size_t iterations, int) {
  alignas(64) const uint8_t ones[kTile][kTileInputs] = {};
  AmxTiles tiles(shapes_of(kTileInputs));
  tiles.load<4>(ones, sizeof ones[0]);
  tiles.load<5>(ones, sizeof ones[0]);
  tiles.load<6>(ones, sizeof ones[0]);
  tiles.load<7>(ones, sizeof ones[0]);
  constexpr size_t kShorter = 8;  // an iteration takes as much longer than those of the other probes
  iterations = iterations / kShorter + 1;
  for (size_t i = 0; i < iterations; i++) {
    tiles.dot<0, 4, 6>();
    tiles.dot<1, 4, 7>();
    tiles.dot<2, 5, 6>();
    tiles.dot<3, 5, 7>();
  }
  return 4.0 * kTile * kTile * kTileInputs * static_cast<double>(iterations);
}

}  // namespace

const Kernels amx_kernels = {
    "amx",     tiled_w4<AmxTiles>, tiled_w8<AmxTiles>, linear_float, kLinearRows, quantize, rmsnorm,
    swiglu,    hadamard,           attention,          kQueryRows,   to_f32,      to_f16,   low_rank_up,
    round_row, tile_probe,         read_probe,
};

const Kernels amx_portable_kernels = {
    "amx-portable",
    tiled_w4<PortableTiles>,
    tiled_w8<PortableTiles>,
    linear_float,
    kLinearRows,
    quantize,
    rmsnorm,
    swiglu,
    hadamard,
    attention,
    kQueryRows,
    to_f32,
    to_f16,
    low_rank_up,
    round_row,
    int8_probe,
    read_probe,
};

}  // namespace llamita
