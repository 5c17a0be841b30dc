// What amx.inc does with tiles, for processors without AMX: included before the kernels
// (tests/test_cpu_amx.py). As Intel's Software Developer's Manual defines LDTILECFG and TDPBF16PS.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct EmulatedTiles {
  uint8_t rows[8];
  uint16_t row_bytes[8];
  char data[8][16][64];
};
inline thread_local EmulatedTiles emulated;

inline void emulated_configure(const char* shapes) {
  memcpy(emulated.row_bytes, shapes + 16, sizeof(emulated.row_bytes));
  memcpy(emulated.rows, shapes + 48, sizeof(emulated.rows));
  memset(emulated.data, 0, sizeof(emulated.data));
}

inline void emulated_load(int tile, const void* from, int64_t stride) {
  memset(emulated.data[tile], 0, sizeof(emulated.data[tile]));
  for (int row = 0; row < emulated.rows[tile]; row++)
    memcpy(emulated.data[tile][row], static_cast<const char*>(from) + row * stride,
           emulated.row_bytes[tile]);
}

inline void emulated_store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < emulated.rows[tile]; row++)
    memcpy(static_cast<char*>(to) + row * stride, emulated.data[tile][row],
           emulated.row_bytes[tile]);
}

inline float emulated_bfloat16(const char* from) {
  uint16_t half;
  memcpy(&half, from, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return std::fpclassify(value) == FP_SUBNORMAL ? 0 : value;
}

// Even columns and odd ones have sums of their own, which are added at the end.
inline void emulated_multiply(int sums, int a, int b) {
  for (int m = 0; m < emulated.rows[sums]; m++) {
    for (int n = 0; n < emulated.row_bytes[sums] / 4; n++) {
      float parts[2] = {};
      for (int k = 0; k < emulated.row_bytes[a] / 4; k++)
        for (int i = 0; i < 2; i++)
          parts[i] = std::fma(emulated_bfloat16(&emulated.data[a][m][4 * k + 2 * i]),
                              emulated_bfloat16(&emulated.data[b][k][4 * n + 2 * i]), parts[i]);
      float sum;
      memcpy(&sum, &emulated.data[sums][m][4 * n], 4);
      sum += parts[0] + parts[1];
      memcpy(&emulated.data[sums][m][4 * n], &sum, 4);
    }
  }
}

#define TILES_CONFIGURE(shapes) emulated_configure(reinterpret_cast<const char*>(&shapes))
#define TILES_RELEASE()
#define TILE_LOAD(tile, from, stride) emulated_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) emulated_store(tile, to, stride)
#define TILE_ZERO(tile) memset(emulated.data[tile], 0, sizeof(emulated.data[tile]))
#define TILE_MULTIPLY(sums, weight, x) emulated_multiply(sums, weight, x)
