// What every call of the op is checked for where it comes from Python: shapes, types and devices of tokens
// and gates.
#pragma once

#include <cmath>

#include "api/python_tensors.h"

namespace gdn2::python {

// q, k [B, T, H, K]; v, w, o [B, T, HV, V]; g, b [B, T, H or HV, K]
struct TokenViews {
  View q, k, v, g, b, w, o;
};

struct GateOptions {
  bool has_scale, use_qk_l2norm, use_gate, has_lower_bound, use_gate_sigmoid;
  double scale = 0, lower_bound = 0, erase_scale = 1;

  explicit GateOptions(Arguments& from) {
    has_scale = from.number(scale);
    use_qk_l2norm = from.flag();
    use_gate = from.flag();
    has_lower_bound = from.number(lower_bound);
    use_gate_sigmoid = from.flag();
    erase_scale = from.number();
  }
};

// Fills in parameters, and remembers whether everything was as the kernels and the op's contract have it.
class CallChecks {
 public:
  bool good() const { return good_; }

 protected:
  void need(bool condition) { good_ = good_ && condition; }

  std::int32_t small(std::int64_t x) {
    need(x >= 0 && x <= std::numeric_limits<std::int32_t>::max());
    return static_cast<std::int32_t>(x);
  }

  // Of o, or of its gradient.
  void need_output(View const& o, View const& v) {
    need(o.kind == v.kind && o.device == v.device && o.has_shape_of(v));
  }

  // Where the inputs lie: tokens(view) makes of a view what the launchers of this kind of call read.
  template <class Call, class Tokens>
  static void fill_tokens(Call& call, TokenViews const& x, Tokens tokens) {
    call.q = tokens(x.q);
    call.k = tokens(x.k);
    call.v = tokens(x.v);
    call.g = tokens(x.g);
    call.b = tokens(x.b);
    call.w = tokens(x.w);
    call.gate_element = static_cast<ElementType>(x.g.kind);
  }

  // From the inputs: all but num_sequences and num_slots.
  void fill_sizes(CallShape& shape, TokenViews const& x) {
    View const &q = x.q, &v = x.v, &g = x.g;
    need(q.device >= 0 && q.ndim == 4 && v.ndim == 4 && g.ndim == 4);
    need(q.kind == Kind::kBFloat16 || q.kind == Kind::kFloat16);
    need(g.kind == q.kind || g.kind == Kind::kFloat32);
    for (View const* other : {&x.k, &x.v, &x.b, &x.w}) {
      need(other->kind == q.kind);
    }
    for (View const* other : {&x.k, &v, &g, &x.b, &x.w}) {
      need(other->device == q.device);
    }
    need(x.k.has_shape_of(q) && x.w.has_shape_of(v) && x.b.has_shape_of(g));
    std::int64_t const heads = q.shape[2], value_heads = v.shape[2], gate_heads = g.shape[2];
    need(v.shape[0] == q.shape[0] && v.shape[1] == q.shape[1]);
    need(g.has_shape(q.shape[0], q.shape[1], gate_heads, q.shape[3]));
    need(heads > 0 && value_heads > 0 && value_heads % std::max<std::int64_t>(heads, 1) == 0);
    need(gate_heads == heads || gate_heads == value_heads);
    need(q.shape[3] > 0 && q.shape[3] <= kMaxDimK && v.shape[3] > 0 && v.shape[3] <= kMaxDimV);
    shape.element = static_cast<ElementType>(q.kind);
    shape.batch = small(q.shape[0]);
    shape.seqlen = small(q.shape[1]);
    shape.num_heads = small(heads);
    shape.num_gate_heads = small(gate_heads);
    shape.num_value_heads = small(value_heads);
    shape.dim_k = small(q.shape[3]);
    shape.dim_v = small(v.shape[3]);
  }

  // A contiguous vector of parameters, or null.
  float const* parameter(View const& view, std::int64_t length, int device) {
    if (!view.given) {
      return nullptr;
    }
    need(view.has_shape(length) && view.kind == Kind::kFloat32 && view.device == device);
    need(view.strides[0] == 1 || length == 1);
    return reinterpret_cast<float const*>(view.data);
  }

  void fill_gates(GateParams& gates, float& scale, GateOptions const& options, CallShape const& shape,
                  View const& A_log, View const& dt_bias, int device) {
    scale = static_cast<float>(options.has_scale ? options.scale : std::pow(shape.dim_k, -0.5));
    gates.use_qk_l2norm = options.use_qk_l2norm;
    gates.decay_gate = !options.use_gate         ? DecayGate::kNone
                       : options.has_lower_bound ? DecayGate::kLowerBound
                                                 : DecayGate::kSoftplus;
    gates.A_log = parameter(A_log, shape.num_heads, device);
    gates.dt_bias = parameter(dt_bias, std::int64_t{shape.num_heads} * shape.dim_k, device);
    if (options.use_gate) {
      need(A_log.given || options.has_lower_bound);
      need(!options.has_lower_bound || options.lower_bound < 0);
    } else {
      need(!A_log.given && !dt_bias.given && !options.has_lower_bound);
    }
    gates.lower_bound = static_cast<float>(options.lower_bound);
    gates.use_gate_sigmoid = options.use_gate_sigmoid;
    need(options.erase_scale == 1 || (options.erase_scale == 2 && options.use_gate_sigmoid));
    gates.erase_scale = static_cast<float>(options.erase_scale);
  }

 private:
  bool good_ = true;
};

}  // namespace gdn2::python
