// One threadgroup per row of raw logits. See row_statistics.py for what is computed.
// Template: T logits, TG threads, NS slices, SLICE columns, SAMPLING 0 argmax, 1 own, 2 other temperature.

constant constexpr float LOWEST = -3.0e38f;  // below every logit; unlike -Inf, safe to subtract

METAL_FUNC float tempered(float raw, float softcap, float divisor) {
  return softcap * metal::precise::tanh(raw / softcap) / divisor;
}

// Index where the running sum of weights passes target, which becomes what is left of it there.
// Behind the total: the last index of weight above zero, and a target that asks the same below.
METAL_FUNC uint pick(const threadgroup float* weights, uint count, thread float& target) {
  float running = 0.0f;
  uint last = 0;
  for (uint i = 0; i < count; i++) {
    const float next = running + weights[i];
    if (next > target) {
      target -= running;
      return i;
    }
    if (weights[i] > 0.0f) {
      last = i;
    }
    running = next;
  }
  target = -LOWEST;
  return last;
}
//: body
    constexpr uint NSG = TG / 32;
    const uint row = threadgroup_position_in_grid.y;
    const uint lid = thread_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint sg = simdgroup_index_in_threadgroup;
    const uint V = logits_shape[1];
    const ulong base = static_cast<ulong>(row) * V;
    const float softcap = settings[0];
    const float temp = settings[1];
    const float divisor = temperature[row];

    threadgroup float part_max[NS * NSG];
    threadgroup float part_z[NS * NSG];
    threadgroup float part_s[NS * NSG];
    threadgroup float part_w[NS * NSG];
    threadgroup float slice_z[NS];
    threadgroup float slice_s[NS];
    threadgroup float slice_w[NS];
    threadgroup float group_best[NSG];
    threadgroup uint group_index[NSG];
    threadgroup uint group_bad[NSG];
    threadgroup float lane_w[TG];
    threadgroup float group_w[NSG];

    // 1. Every thread walks its columns of every slice; a slice's (max, z, s) meet per SIMD-group.
    float best = LOWEST;
    uint best_index = 0xffffffffu;
    uint bad = 0;
    for (uint k = 0; k < NS; k++) {
      const uint stop = metal::min(V, (k + 1) * static_cast<uint>(SLICE));
      float m = LOWEST;
      float z = 0.0f;
      float s = 0.0f;
      float w = 0.0f;
      for (uint i = k * SLICE + lid * 4; i < stop; i += TG * 4) {
        float t[4];
        float top = LOWEST;
        #pragma clang loop unroll(full)
        for (uint j = 0; j < 4; j++) {
          t[j] = LOWEST;
          if (i + j < stop) {
            float raw = static_cast<float>(logits[base + i + j]);
            if (!metal::isfinite(raw)) {
              bad = 1;
              raw = 0.0f;
            }
            t[j] = tempered(raw, softcap, divisor);
            if (t[j] > best) {
              best = t[j];
              best_index = i + j;
            }
          }
          top = metal::max(top, t[j]);
        }
        const float now = metal::max(m, top);
        const float shrink = metal::exp(m - now);
        s = shrink * (s + z * (m - now));
        z *= shrink;
        if (SAMPLING == 2) {
          w *= metal::exp((m - now) / temp);
        }
        #pragma clang loop unroll(full)
        for (uint j = 0; j < 4; j++) {
          const float shifted = t[j] - now;
          const float e = metal::exp(shifted);  // columns behind the end give exactly zero
          z += e;
          if (e > 0.0f) {
            s += e * shifted;
          }
          if (SAMPLING == 2) {
            w += metal::exp(shifted / temp);
          }
        }
        m = now;
      }
      const float top = simd_max(m);
      const float shrink = metal::exp(m - top);
      const float sum_z = simd_sum(shrink * z);
      const float sum_s = simd_sum(z > 0.0f ? shrink * (s + z * (m - top)) : 0.0f);
      const float sum_w = simd_sum(SAMPLING == 2 ? w * metal::exp((m - top) / temp) : 0.0f);
      if (lane == 0) {
        part_max[k * NSG + sg] = top;
        part_z[k * NSG + sg] = sum_z;
        part_s[k * NSG + sg] = sum_s;
        part_w[k * NSG + sg] = sum_w;
      }
    }
    const float group_top = simd_max(best);
    const uint group_first = simd_min(best == group_top ? best_index : 0xffffffffu);
    const uint any_bad = simd_max(bad);
    if (lane == 0) {
      group_best[sg] = group_top;
      group_index[sg] = group_first;
      group_bad[sg] = any_bad;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // 2. One thread per slice brings its parts to the row's maximum.
    float row_max = LOWEST;
    for (uint e = lane; e < NS * NSG; e += 32) {
      row_max = metal::max(row_max, part_max[e]);
    }
    row_max = simd_max(row_max);
    for (uint k = lid; k < NS; k += TG) {
      float z = 0.0f;
      float s = 0.0f;
      float w = 0.0f;
      for (uint g = 0; g < NSG; g++) {
        const uint e = k * NSG + g;
        const float behind = part_max[e] - row_max;
        const float shrink = metal::exp(behind);
        z += shrink * part_z[e];
        if (part_z[e] > 0.0f && shrink > 0.0f) {
          s += shrink * (part_s[e] + part_z[e] * behind);
        }
        if (SAMPLING == 2) {
          w += metal::exp(behind / temp) * part_w[e];
        }
      }
      slice_z[k] = z;
      slice_s[k] = s;
      slice_w[k] = SAMPLING == 2 ? w : z;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // 3. The statistics.
    float z = 0.0f;
    float s = 0.0f;
    float w = 0.0f;
    for (uint k = 0; k < NS; k++) {
      z += slice_z[k];
      s += slice_s[k];
      w += slice_w[k];
    }
    if (lid == 0) {
      float top = LOWEST;
      uint index = 0xffffffffu;
      uint poisoned = 0;
      for (uint g = 0; g < NSG; g++) {
        if (group_best[g] > top || (group_best[g] == top && group_index[g] < index)) {
          top = group_best[g];
          index = group_index[g];
        }
        poisoned |= group_bad[g];
      }
      const float log_sum = metal::log(z);
      entropy[row] = poisoned != 0 ? NAN : log_sum - s / z;
      argmax[row] = static_cast<int>(index);
      maximum[row] = row_max;
      log_z[row] = row_max + log_sum;
      if (SAMPLING == 0) {
        sample[row] = static_cast<int>(index);
      }
    }

    // 4. The sample: the slice by the first uniform, the column inside it by the second.
    if (SAMPLING != 0) {
      float target = uniforms[row * 2] * w;
      const uint chosen = pick(slice_w, NS, target);
      float top = LOWEST;
      for (uint g = 0; g < NSG; g++) {
        top = metal::max(top, part_max[chosen * NSG + g]);
      }
      const uint stop = metal::min(V, (chosen + 1) * static_cast<uint>(SLICE));
      const uint start = chosen * SLICE;
      const uint run = (stop - start + TG - 1) / TG;
      const float sharpen = SAMPLING == 2 ? temp : 1.0f;
      float mine = 0.0f;
      for (uint j = 0; j < run; j++) {
        const uint i = start + lid * run + j;
        if (i < stop) {
          const float raw = static_cast<float>(logits[base + i]);
          const float t = tempered(metal::isfinite(raw) ? raw : 0.0f, softcap, divisor);
          mine += metal::exp((t - top) / sharpen);
        }
      }
      lane_w[lid] = mine;
      const float together = simd_sum(mine);
      if (lane == 0) {
        group_w[sg] = together;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (lid == 0) {
        float total = 0.0f;
        for (uint g = 0; g < NSG; g++) {
          total += group_w[g];
        }
        float left = uniforms[row * 2 + 1] * total;
        const uint group = pick(group_w, NSG, left);
        const uint thread_index = group * 32 + pick(lane_w + group * 32, 32, left);
        float running = 0.0f;
        uint found = start + thread_index * run;
        for (uint j = 0; j < run; j++) {
          const uint i = start + thread_index * run + j;
          if (i >= stop) {
            break;
          }
          const float raw = static_cast<float>(logits[base + i]);
          const float t = tempered(metal::isfinite(raw) ? raw : 0.0f, softcap, divisor);
          const float e = metal::exp((t - top) / sharpen);
          running += e;
          if (e > 0.0f) {
            found = i;
          }
          if (running > left) {
            break;
          }
        }
        sample[row] = static_cast<int>(found);
      }
    }
