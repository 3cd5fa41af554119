// The weighted sum over a token's experts, one thread per (token, column), in the order of choice,
// from rows in the order of experts.
// Template: T activations, TOP_K.
//: body
    const uint H = rows_shape[1];
    const uint column = thread_position_in_grid.x;
    const uint token = thread_position_in_grid.y;
    float sum = 0.0f;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < TOP_K; j++) {
      const uint pair = token * TOP_K + j;
      const ulong row = static_cast<ulong>(places[pair]);
      sum += static_cast<float>(rows[row * H + column]) * weights[pair];
    }
    y[static_cast<ulong>(token) * H + column] = static_cast<T>(sum);
