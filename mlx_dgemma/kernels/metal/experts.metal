// One expert matrix times the rows routed to it: a tile of TM rows by 32 (GLU) or 64 output columns.
// GLU: rows are gathered from tokens, gate and up are multiplied side by side, gelu(gate) * up is
// written in sorted order. Otherwise rows are read and written in sorted order.
// Template: T activations, TM rows, BITS 0 (dense), 4 or 8, FP4 (mxfp4 codes in 4 bits), GROUP, GLU,
// EXPERTS, TOP_K.
//
// Four SIMD-groups; each owns all rows of the tile and two blocks of 8 columns, so that no weight is
// unpacked twice and GeGLU stays in registers. What is computed is the transpose, weights times rows:
// then a lane holds two neighbouring inputs of one weight row and unpacks them where they are
// multiplied. Of BK inputs a lane owns 8 in a row, a quarter; fragment m takes its inputs 2m and
// 2m + 1. The rows are staged in the same order, which changes no sum but its order.

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
    constexpr int SPAN = TM * BK / 128;  // neighbouring inputs that a thread stages
    constexpr int WIDE = SPAN < 4 ? SPAN : 4;
    const int K = x_shape[1];
    const int O = GLU ? w_shape[1] / 2 : w_shape[1];
    const int lid = thread_index_in_threadgroup;
    const int lane = thread_index_in_simdgroup;
    const int sg = simdgroup_index_in_threadgroup;
    const int tile = threadgroup_position_in_grid.y;
    const int column0 = threadgroup_position_in_grid.x * COLUMNS;

    threadgroup T Xs[TM * LD];
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

    // Where a lane's two elements lie in an 8 x 8 fragment: (fm, fn) and (fm, fn + 1).
    const int fm = (lane / 16) * 4 + (lane / 2) % 4;
    const int quarter = (lane / 8) % 2 * 2 + lane % 2;
    // The two weight rows of this lane; behind the last column any row will do, it is not written.
    ulong weight_row[2];
    #pragma clang loop unroll(full)
    for (int c = 0; c < 2; c++) {
      const int column = metal::min(column0 + (GLU ? sg : sg * 2 + c) * 8 + fm, O - 1);
      const int matrix_rows = GLU ? 2 * O : O;
      weight_row[c] = static_cast<ulong>(expert) * matrix_rows + column + (GLU ? c * O : 0);
    }
    // The part of a row that this thread stages.
    const int staged_row = lid / (BK / SPAN);
    const int staged_k = lid % (BK / SPAN) * SPAN;
    const bool real = staged_row < rows;
    const int pair = row0 + (real ? staged_row : 0);
    const int source = GLU ? order[pair] / TOP_K : pair;
    const device T* from = x + static_cast<ulong>(source) * K + staged_k;

    for (int k0 = 0; k0 < K; k0 += BK) {
      // 2. Unpack this lane's weights into fragments.
      simdgroup_matrix<T, 8, 8> weight[2][4];
      #pragma clang loop unroll(full)
      for (int c = 0; c < 2; c++) {
        const ulong first = weight_row[c] * K + k0 + quarter * 8;
        if (BITS == 0) {
          #pragma clang loop unroll(full)
          for (int j = 0; j < 8; j++) {
            weight[c][j / 2].thread_elements()[j % 2] = static_cast<T>(w[first + j]);
          }
        } else {
          constexpr int PER_WORD = BITS == 8 ? 4 : 8;
          constexpr uint MASK = BITS == 8 ? 0xffu : 0xfu;
          const ulong group = first / GROUP;
          const float stored = static_cast<float>(scales[group]);
          const float scale = FP4 ? metal::precise::exp2(stored - 127.0f) : stored;
          const float bias = FP4 ? 0.0f : static_cast<float>(biases[group]);
          #pragma clang loop unroll(full)
          for (int j = 0; j < 8; j++) {
            const uint packed = static_cast<uint>(w[first / PER_WORD + j / PER_WORD]);
            const uint code = (packed >> (j % PER_WORD * (32 / PER_WORD))) & MASK;
            float value = static_cast<float>(code);
            if (FP4) {
              value = (code & 8u) != 0 ? -MAGNITUDES[code & 7u] : MAGNITUDES[code & 7u];
            }
            weight[c][j / 2].thread_elements()[j % 2] = static_cast<T>(scale * value + bias);
          }
        }
      }
      // 3. Stage the rows, gathered from their tokens, with zeros after the last; blocks of rows
      // that are empty are never read.
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (staged_row < (rows + 7) / 8 * 8) {
        #pragma clang loop unroll(full)
        for (int e = 0; e < SPAN; e += WIDE) {
          metal::vec<T, WIDE> values = metal::vec<T, WIDE>(T(0));
          if (real) {
            values = *reinterpret_cast<const device metal::vec<T, WIDE>*>(from + k0 + e);
          }
          #pragma clang loop unroll(full)
          for (int j = 0; j < WIDE; j++) {
            const int k = staged_k + e + j;
            Xs[staged_row * LD + k % 8 / 2 * 8 + k / 8 * 2 + k % 2] = values[j];
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      // 4. Multiply. Every thread of the group takes the same turns.
      #pragma clang loop unroll(full)
      for (int i = 0; i < BLOCKS; i++) {
        if (i * 8 < rows) {
          #pragma clang loop unroll(full)
          for (int m = 0; m < 4; m++) {
            simdgroup_matrix<T, 8, 8> row;
            simdgroup_load(row, Xs + i * 8 * LD + m * 8, LD, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(acc[i][0], weight[0][m], row, acc[i][0]);
            simdgroup_multiply_accumulate(acc[i][1], weight[1][m], row, acc[i][1]);
          }
        }
      }
    }

    // 5. GeGLU in registers (gate and up share a lane layout), then out through threadgroup memory.
    #pragma clang loop unroll(full)
    for (int i = 0; i < BLOCKS; i++) {
      if (i * 8 < rows) {
        threadgroup float* to = Ys + i * 8 * COLUMNS + sg * (GLU ? 8 : 16);
        if (GLU) {
          #pragma clang loop unroll(full)
          for (int j = 0; j < 2; j++) {
            const float gate = static_cast<float>(static_cast<T>(acc[i][0].thread_elements()[j]));
            const float up = static_cast<float>(static_cast<T>(acc[i][1].thread_elements()[j]));
            acc[i][0].thread_elements()[j] = gelu_tanh(gate) * up;
          }
          simdgroup_store(acc[i][0], to, COLUMNS, ulong2(0, 0), true);
        } else {
          simdgroup_store(acc[i][0], to, COLUMNS, ulong2(0, 0), true);
          simdgroup_store(acc[i][1], to + 8, COLUMNS, ulong2(0, 0), true);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int q = lid; q < rows * COLUMNS; q += 128) {
      const int r = q / COLUMNS;
      const int c = column0 + q % COLUMNS;
      if (c < O) {
        y[static_cast<ulong>(row0 + r) * O + c] = static_cast<T>(Ys[q]);
      }
    }
