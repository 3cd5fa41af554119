// RMSNorm and rope of one head at one position per SIMD-group, written heads first.
// Inputs are read through their strides, so parts of a joint projection need no copy.
// Template: T, D head dimension (a multiple of 64), HAS_WEIGHT, HAS_ROPE.
//: body
    constexpr uint PAIRS = D / 64;  // pairs (i, i + D / 2) per lane
    const uint lane = thread_position_in_grid.x;
    const uint head = thread_position_in_grid.y;
    const uint heads = x_shape[2];
    const uint length = x_shape[1];
    const uint b = thread_position_in_grid.z / length;
    const uint l = thread_position_in_grid.z % length;
    const long from = b * x_strides[0] + l * x_strides[1] + head * x_strides[2];

    float low[PAIRS];
    float high[PAIRS];
    float squares = 0.0f;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PAIRS; j++) {
      const uint i = j * 32 + lane;
      low[j] = static_cast<float>(x[from + i * x_strides[3]]);
      high[j] = static_cast<float>(x[from + (i + D / 2) * x_strides[3]]);
      squares += low[j] * low[j] + high[j] * high[j];
    }
    const float mean = simd_sum(squares) / static_cast<float>(D);
    const float factor = metal::precise::rsqrt(mean + eps[0]);
    const ulong to = ((static_cast<ulong>(b) * heads + head) * length + l) * D;
    #pragma clang loop unroll(full)
    for (uint j = 0; j < PAIRS; j++) {
      const uint i = j * 32 + lane;
      float first = low[j] * factor;
      float second = high[j] * factor;
      if (HAS_WEIGHT) {
        first *= static_cast<float>(weight[i]);
        second *= static_cast<float>(weight[i + D / 2]);
      }
      if (HAS_ROPE) {
        const float c = static_cast<float>(cosine[l * (D / 2) + i]);
        const float s = static_cast<float>(sine[l * (D / 2) + i]);
        const float turned = first * c - second * s;
        second = second * c + first * s;
        first = turned;
      }
      y[to + i] = static_cast<T>(first);
      y[to + i + D / 2] = static_cast<T>(second);
    }
