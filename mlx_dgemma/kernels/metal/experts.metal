// One expert matrix times the rows routed to it: a tile of TM rows by 32 (GLU) or 64 output columns.
// GLU: rows are gathered from tokens, gate and up are multiplied side by side, gelu(gate) * up is
// written in sorted order. Otherwise rows are read in sorted order and written at their pair's place.
// Template: T activations, TM rows, BITS 0 (dense), 4 or 8, FP4 (mxfp4 codes in 4 bits), GROUP, GLU,
// EXPERTS, TOP_K.
// Four SIMD-groups; each owns all rows of the tile and two blocks of 8 columns, so that no weight is
// unpacked twice and GeGLU stays in registers.

// Magnitudes of a four-bit float with two exponent bits and one of mantissa.
constant constexpr float MAGNITUDES[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

METAL_FUNC float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + metal::precise::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
//: body
    constexpr int BK = 32;
    constexpr int LD = BK + 8;          // padded rows, so that a column is not one memory bank
    constexpr int BLOCKS = TM / 8;
    constexpr int COLUMNS = GLU ? 32 : 64;
    const int K = x_shape[1];
    const int O = GLU ? w_shape[1] / 2 : w_shape[1];
    const int lid = thread_index_in_threadgroup;
    const int lane = thread_index_in_simdgroup;
    const int sg = simdgroup_index_in_threadgroup;
    const int tile = threadgroup_position_in_grid.y;
    const int column0 = threadgroup_position_in_grid.x * COLUMNS;

    threadgroup T Xs[TM * LD];
    threadgroup T Ws[4 * 16 * LD];
    threadgroup float Ys[TM * COLUMNS];
    threadgroup int found[2];

    // 1. Which expert's which rows: tiles are cut inside an expert, never across two.
    if (lid == 0) {
      found[0] = -1;
      found[1] = 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg == 0) {
      int before = 0;
      for (int e0 = 0; e0 < EXPERTS; e0 += 32) {
        const int e = e0 + lane;
        const int rows = e < EXPERTS ? offsets[e + 1] - offsets[e] : 0;
        const int tiles = (rows + TM - 1) / TM;
        const int first = before + simd_prefix_exclusive_sum(tiles);
        if (tile >= first && tile < first + tiles) {
          found[0] = e;
          found[1] = tile - first;
        }
        before += simd_sum(tiles);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int expert = found[0];
    if (expert < 0) {
      return;  // the grid is the worst case; this tile is not needed
    }
    const int row0 = offsets[expert] + found[1] * TM;
    const int rows = metal::min(static_cast<int>(TM), offsets[expert + 1] - row0);

    simdgroup_matrix<float, 8, 8> acc[BLOCKS][2];
    #pragma clang loop unroll(full)
    for (int i = 0; i < BLOCKS; i++) {
      acc[i][0] = simdgroup_matrix<float, 8, 8>(0.0f);
      acc[i][1] = simdgroup_matrix<float, 8, 8>(0.0f);
    }

    // The weight row this lane unpacks: 16 rows per SIMD-group, two lanes per row, 16 columns each.
    const int own_row = lane / 2;
    const int half_k = (lane % 2) * 16;
    const int out_row = GLU ? column0 + sg * 8 + (own_row % 8) + (own_row / 8) * O : column0 + sg * 16 + own_row;
    const bool real_row = GLU ? column0 + sg * 8 + (own_row % 8) < O : out_row < O;
    const int matrix_rows = GLU ? 2 * O : O;
    const ulong weight_row = static_cast<ulong>(expert) * matrix_rows + (real_row ? out_row : 0);
    threadgroup T* mine = Ws + (sg * 16 + own_row) * LD + half_k;

    for (int k0 = 0; k0 < K; k0 += BK) {
      // 2. Stage the rows, gathered from their tokens, zeros behind the expert's last.
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int q = lid; q < TM * BK; q += 128) {
        const int r = q / BK;
        T value = T(0);
        if (r < rows) {
          const int source = GLU ? order[row0 + r] / TOP_K : row0 + r;
          value = x[static_cast<ulong>(source) * K + k0 + q % BK];
        }
        Xs[r * LD + q % BK] = value;
      }
      // 3. Unpack this SIMD-group's weights.
      if (!real_row) {
        #pragma clang loop unroll(full)
        for (int j = 0; j < 16; j++) {
          mine[j] = T(0);
        }
      } else if (BITS == 0) {
        #pragma clang loop unroll(full)
        for (int j = 0; j < 16; j++) {
          mine[j] = static_cast<T>(w[weight_row * K + k0 + half_k + j]);
        }
      } else {
        constexpr int PER_WORD = BITS == 8 ? 4 : 8;
        constexpr uint MASK = BITS == 8 ? 0xffu : 0xfu;
        const ulong group = (weight_row * K + k0) / GROUP;
        const float stored = static_cast<float>(scales[group]);
        const float scale = FP4 ? metal::precise::exp2(stored - 127.0f) : stored;
        const float bias = FP4 ? 0.0f : static_cast<float>(biases[group]);
        #pragma clang loop unroll(full)
        for (int word = 0; word < 16 / PER_WORD; word++) {
          const uint packed = static_cast<uint>(w[(weight_row * K + k0 + half_k) / PER_WORD + word]);
          #pragma clang loop unroll(full)
          for (int j = 0; j < PER_WORD; j++) {
            const uint code = (packed >> (j * (32 / PER_WORD))) & MASK;
            float value = static_cast<float>(code);
            if (FP4) {
              value = (code & 8u) != 0 ? -MAGNITUDES[code & 7u] : MAGNITUDES[code & 7u];
            }
            mine[word * PER_WORD + j] = static_cast<T>(scale * value + bias);
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      // 4. Multiply.
      #pragma clang loop unroll(full)
      for (int kk = 0; kk < BK; kk += 8) {
        simdgroup_matrix<T, 8, 8> b[2];
        simdgroup_load(b[0], Ws + sg * 16 * LD + kk, LD, ulong2(0, 0), true);
        simdgroup_load(b[1], Ws + (sg * 16 + 8) * LD + kk, LD, ulong2(0, 0), true);
        #pragma clang loop unroll(full)
        for (int i = 0; i < BLOCKS; i++) {
          simdgroup_matrix<T, 8, 8> a;
          simdgroup_load(a, Xs + i * 8 * LD + kk, LD);
          simdgroup_multiply_accumulate(acc[i][0], a, b[0], acc[i][0]);
          simdgroup_multiply_accumulate(acc[i][1], a, b[1], acc[i][1]);
        }
      }
    }

    // 5. GeGLU in registers (gate and up share a lane layout), then out through threadgroup memory.
    #pragma clang loop unroll(full)
    for (int i = 0; i < BLOCKS; i++) {
      if (GLU) {
        #pragma clang loop unroll(full)
        for (int j = 0; j < 2; j++) {
          const float gate = static_cast<float>(static_cast<T>(acc[i][0].thread_elements()[j]));
          const float up = static_cast<float>(static_cast<T>(acc[i][1].thread_elements()[j]));
          acc[i][0].thread_elements()[j] = gelu_tanh(gate) * up;
        }
        simdgroup_store(acc[i][0], Ys + i * 8 * COLUMNS + sg * 8, COLUMNS);
      } else {
        simdgroup_store(acc[i][0], Ys + i * 8 * COLUMNS + sg * 16, COLUMNS);
        simdgroup_store(acc[i][1], Ys + i * 8 * COLUMNS + sg * 16 + 8, COLUMNS);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int q = lid; q < rows * COLUMNS; q += 128) {
      const int r = q / COLUMNS;
      const int c = column0 + q % COLUMNS;
      if (c < O) {
        const int place = GLU ? row0 + r : order[row0 + r];
        y[static_cast<ulong>(place) * O + c] = static_cast<T>(Ys[q]);
      }
    }
